"""Uploads to the hub: what is uploaded lies whole on the disk, and an upload that fails is a line in the log."""

from __future__ import annotations

import logging
import shlex
from concurrent.futures import Future
from pathlib import Path

import requests
from huggingface_hub import HfApi, configure_http_backend, constants
from transformers.trainer_utils import HubStrategy

from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.arguments.model_files import first_line
from gaudi_lm.training.resume import UNUSED

logger = logging.getLogger("gaudi_lm")

TO_RESUME = ["optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "manifest.json", "global_step*", "latest"]
CHECKPOINTS = ["checkpoint-*", f"{UNUSED}checkpoint-*"]
NOT_THE_RESULT = [*CHECKPOINTS, "incomplete-*", "complete-files/*", "_*", "logs/*"]  # a pattern is of whole paths

# Seconds until a connection is there, and until more of an answer is. In the first of them, urllib3 also wants a body
# of bytes to be sent as a whole: that of a commit has all small files, and a line may be slow.
PATIENCE = 300


class _Patience(requests.adapters.HTTPAdapter):
    """huggingface_hub 0.36 would wait for a hub that does not answer, and a run that is done with it, without end."""

    def send(self, request, stream=False, timeout=None, verify=True, cert=None, proxies=None):
        return super().send(request, stream, timeout or PATIENCE, verify, cert, proxies)


def _session() -> requests.Session:
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Patience())
    return session


class HubUploads:
    """Uploads of the main rank to the repository of ``--hub_model_id``, one after the other, in a thread."""

    def __init__(self, args: LMTrainingArguments):
        self.args, self.folder = args, Path(args.output_dir).resolve()
        self.name = args.hub_model_id or self.folder.name
        self._api = HfApi(token=args.hub_token)
        self._running: list[tuple[Future, Path]] = []
        if args.push_to_hub and not constants.HF_HUB_OFFLINE:
            configure_http_backend(_session)

    def checkpoint(self, folder: Path, step: int) -> None:
        """Begin to upload a checkpoint, as ``--hub_strategy`` says; none while an earlier one is still under way."""
        busy = not all(job.done() for job, _ in self._running)
        if self.args.hub_strategy == HubStrategy.END or (busy and not self.args.hub_always_push):
            return
        self._report(self._errors(), "a checkpoint of ")
        folders = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        self._begin(folder, message := f"Training in progress, step {step}", TO_RESUME)
        if path_in_repo := folders.get(self.args.hub_strategy):
            self._begin(folder, f"{message}, checkpoint", None, path_in_repo)

    def is_uploading(self, folder: str) -> bool:
        """Whether the files of a checkpoint are still being read."""
        return any(not job.done() and path == Path(folder).resolve() for job, path in self._running)

    def result(self, message: str) -> None:
        """Upload what is at the top of ``--output_dir``, and wait for it."""
        earlier = self._errors()
        job = self._begin(self.folder, message, NOT_THE_RESULT)
        if errors := self._errors():
            self._report(errors)
            return
        logger.info("Uploaded to %s/%s", self._api.endpoint, job.result())
        self._report(earlier, "a checkpoint of ")

    def _errors(self) -> list[BaseException]:
        """Wait for what is being uploaded; what went wrong."""
        jobs, self._running = self._running, []
        return [error for job, _ in jobs if (error := job.exception())]

    def _report(self, errors: list[BaseException], what: str = "") -> None:
        if errors:
            args, command = self.args, ["hf", "upload", self.name, str(self.folder)]
            command += ["--private"] * bool(args.hub_private_repo)
            command += ["--revision", args.hub_revision] if args.hub_revision else []
            logger.warning(
                "--push_to_hub: %s%s was not uploaded (%s). All of it is on the disk: start the run again, or `%s`",
                what, self.name, first_line(errors[0]), shlex.join([*command, "--exclude", *CHECKPOINTS]),
            )  # fmt: skip

    def _begin(self, folder: Path, message: str, ignored: list[str] | None, path_in_repo: str | None = None) -> Future:
        job = self._api.run_as_future(self._upload, folder, message, ignored, path_in_repo)
        self._running.append((job, folder.resolve()))
        return job

    def _upload(self, folder: Path, message: str, ignored: list[str] | None, path_in_repo: str | None) -> str:
        args, to = self.args, {"commit_message": message, "revision": self.args.hub_revision}
        name = self._api.create_repo(self.name, private=args.hub_private_repo, exist_ok=True).repo_id
        if args.hub_revision:
            self._api.create_branch(name, branch=args.hub_revision, exist_ok=True)
        to |= {"repo_id": name, "path_in_repo": path_in_repo}
        self._api.upload_folder(folder_path=folder, ignore_patterns=ignored, **to)
        return name
