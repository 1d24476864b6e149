"""The builder of ``datasets`` that reads files, alone in its module, which ``datasets`` changes unless it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import ArrowBasedBuilder, BuilderConfig, DatasetInfo, SplitGenerator
from datasets.builder import Key

from gaudi_lm.errors import UserError

# `datasets` asks for it before it replaces `open`, `os` and others in the module of a builder by variants
# that take addresses, and read names with ``::`` or ``*`` otherwise. It would import scipy for one of them.
_patched_for_streaming = True


@dataclass
class FilesConfig(BuilderConfig):
    files: Any = None


class FilesBuilder(ArrowBasedBuilder):
    """Reads a :class:`gaudi_lm.data.readers.FileSet` once and keeps its rows in Arrow files of the cache."""

    BUILDER_CONFIG_CLASS = FilesConfig

    def _info(self):
        return DatasetInfo()

    def _split_generators(self, dl_manager):
        self.info.features = self.config.files.features()
        return [SplitGenerator(name="train", gen_kwargs={"paths": list(self.config.files.paths)})]

    def _generate_tables(self, paths):
        rows = 0
        for shard, path in enumerate(paths):
            for number, table in enumerate(self.config.files.fitting_tables(path, self.info.features)):
                rows += len(table)
                yield Key(shard, number), table
        if not rows:
            raise UserError(f"{paths[0]}: no rows{f', nor in the {len(paths) - 1} other files' if paths[1:] else ''}")
