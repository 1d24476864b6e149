"""Models with code of their own in their folder, whose forward knows tokens and labels alone."""

import json
from pathlib import Path

import pytest
from running import check_refused, run

CONFIGURATION = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own_model"

    def __init__(self, vocab_size=512, width=16, **kwargs):
        self.vocab_size, self.width = vocab_size, width
        super().__init__(**kwargs)
"""
MODEL = """
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    _tied_weights_keys = ["head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.mixer = nn.GRU(config.width, config.width, batch_first=True)
        self.inner = nn.Linear(config.width, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        return CausalLMOutput(logits=self.head(self.inner(self.mixer(self.embedding(input_ids))[0])))
"""
GENERATING = ("(PreTrainedModel)", "(PreTrainedModel, GenerationMixin)")
UNDECLARED = ('    _tied_weights_keys = ["head.weight"]\n', "")


def write(folder: Path, *changes: tuple[str, str]) -> list:
    """Flags for a new model of the class in ``folder``, with these changes to its code."""
    folder.mkdir(parents=True)
    code = MODEL
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(code)
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own_model", "auto_map": names}))
    return ["--config_name", folder, "--trust_remote_code"]


@pytest.mark.slow
def test_a_class_that_takes_tokens_alone(assets, instructions, tmp_path):
    """It trains with rows that are padded, evaluates and answers; so it does with an adapter."""
    flags = ["--do_train", "--max_steps", "2", "--use_cpu", "--generate", "The"]
    model = [*write(tmp_path / "model"), "--tokenizer_name", assets.tokenizer, "--train_file", assets.train]
    done = run("run_clm.py", *model, *flags, "--do_eval", "--block_size", "32", "--output_dir", tmp_path / "trained")
    assert "'The' -> " in done.stderr
    config, *trusted = write(tmp_path / "tuned", GENERATING)[1:]
    run(
        "run_clm.py", "--config_name", config, *trusted, "--tokenizer_name", instructions.llama, "--train_file",
        assets.train, "--block_size", "32", *flags, "--output_dir", tmp_path / "base",
    )  # fmt: skip
    done = run(
        "run_lora_clm.py", "--model_name_or_path", tmp_path / "base", *trusted, "--train_file", instructions.train,
        "--lora_target_modules", "inner", "--merge_adapter", *flags, "--output_dir", tmp_path / "adapter",
    )  # fmt: skip
    assert "'The' -> " in done.stderr and (tmp_path / "adapter/merged/model.safetensors").is_file()


@pytest.mark.slow
def test_what_could_not_be_saved_or_adapted_is_refused_before_training(assets, instructions, tmp_path):
    flags = ["--do_train", "--max_steps", "1", "--use_cpu"]
    text = ["--tokenizer_name", assets.tokenizer, "--train_file", assets.train, "--block_size", "32"]
    shared = write(tmp_path / "shared", UNDECLARED)
    more = [*flags, "--output_dir", tmp_path / "output"]
    message = "embedding.weight and head.weight are one tensor, which safetensors saves once: give the class _tied"
    check_refused("run_clm.py", {"shared": ([*shared, *text], message)}, more, tmp_path, tmp_path / "output")
    run("run_clm.py", *shared, *text, *flags, "--save_safetensors", "False", "--output_dir", tmp_path / "pickled")
    base = [*write(tmp_path / "model"), *text, *flags, "--output_dir", tmp_path / "base"]
    run("run_clm.py", *base)
    tuned = [
        "--model_name_or_path", tmp_path / "base", "--trust_remote_code", "--train_file", instructions.train,
        "--lora_target_modules", "inner",
    ]  # fmt: skip
    message = "derive it from GenerationMixin as well"
    check_refused("run_lora_clm.py", {"it": (tuned, message)}, more, tmp_path, tmp_path / "output")


LOADING = {
    "alone": """
    @classmethod
    def from_pretrained(cls, name, *inputs, config=None, **kwargs):
        model = cls(config)
        model.load_state_dict(load_file(f"{name}/model.safetensors"), strict=False)
        return model
""",
    "added to": """
    @classmethod
    def from_pretrained(cls, name, *inputs, **kwargs):
        model = super().from_pretrained(name, *inputs, **kwargs)
        model.width = model.embedding.embedding_dim
        return model
""",
}


@pytest.mark.slow
def test_a_class_may_load_its_weights_by_itself(assets, tmp_path):
    flags = ["--do_train", "--max_steps", "1", "--use_cpu", "--learning_rate", "0"]
    flags += ["--tokenizer_name", assets.tokenizer, "--train_file", assets.train, "--block_size", "32"]
    run("run_clm.py", *write(tmp_path / "new"), *flags, "--output_dir", tmp_path / "saved")
    whole = (tmp_path / "saved/model.safetensors").read_bytes()
    code = tmp_path / "saved/modeling_own.py"
    first = "from safetensors.torch import load_file\n" + code.read_text()
    for name, method in LOADING.items():
        code.write_text(first.replace("    def forward", method.lstrip("\n") + "\n    def forward"))
        trusted = ["--model_name_or_path", tmp_path / "saved", "--trust_remote_code"]
        run("run_clm.py", *trusted, *flags, "--output_dir", tmp_path / name)
        assert (tmp_path / name / "model.safetensors").read_bytes() == whole
