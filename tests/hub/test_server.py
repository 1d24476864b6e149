"""The hub as the real clients see it, each in a process of its own, as HF_ENDPOINT is read at import."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hub.server import Cut, Hub
from hub.stand_ins import GATED

pytestmark = pytest.mark.slow

DOWNLOAD = """
from huggingface_hub import hf_hub_download
import sys
print(hf_hub_download(sys.argv[1], sys.argv[2], revision=sys.argv[3], token=sys.argv[4] or None))
"""


def client(hub: Hub, home: Path, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=hub.environment(home) | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def download(hub: Hub, home: Path, name: str, file: str, revision: str = "main", token: str = "", **environment: str):
    """(path, stderr) of a download, path None when it failed."""
    done = client(hub, home, DOWNLOAD, name, file, revision, token, **environment)
    return (Path(done.stdout.strip()) if done.returncode == 0 else None), done.stderr


def bodies(hub: Hub, file: str) -> list[str]:
    """The paths of the GET requests that were answered with (part of) a file."""
    return [path for method, path, status, _ in hub.log if method == "GET" and status in (200, 206) and file in path]


def test_download_follows_the_move_and_the_revision(hub: Hub, tmp_path: Path):
    main, _ = download(hub, tmp_path, "gpt2", "model.safetensors")
    other, _ = download(hub, tmp_path, "gpt2", "model.safetensors", revision="v2")
    commits = {branch: hub.revision("models", "openai-community/gpt2", branch).commit for branch in ("main", "v2")}
    assert main.parent.name == commits["main"]
    assert other.parent.name == commits["v2"]
    served = hub.root / "models/openai-community/gpt2"
    assert main.read_bytes() == (served / "main/model.safetensors").read_bytes()
    assert other.read_bytes() == (served / "v2/model.safetensors").read_bytes()
    assert main.read_bytes() != other.read_bytes()
    by_commit, _ = download(hub, tmp_path, "gpt2", "config.json", revision=commits["v2"])
    assert by_commit.parent == other.parent
    assert hub.escapes == []


def test_unchanged_etag_is_not_fetched_twice(hub: Hub, tmp_path: Path):
    for file in ("config.json", "model.safetensors"):
        first, _ = download(hub, tmp_path, "gpt2", file)
        second, _ = download(hub, tmp_path, "gpt2", file)
        assert first == second
        assert len(bodies(hub, file)) == 1


def test_token_opens_a_gated_model(hub: Hub, tmp_path: Path):
    refused, message = download(hub, tmp_path, GATED, "config.json")
    assert refused is None
    assert "GatedRepoError: 401" in message
    wrong, message = download(hub, tmp_path, GATED, "config.json", token="hf_stranger")
    assert wrong is None
    assert "401" in message
    opened, _ = download(hub, tmp_path, GATED, "config.json", token="hf_reader")
    assert opened.is_file()
    by_environment, _ = download(hub, tmp_path / "other", GATED, "config.json", HF_TOKEN="hf_reader")
    assert by_environment.is_file()
    assert {token for *_, status, token in hub.log if status == 200} == {"hf_reader"}


@pytest.mark.parametrize(
    ("name", "file", "revision", "token", "error"),
    [
        ("nobody/nothing", "config.json", "main", "", "RepositoryNotFoundError: 401"),
        ("nobody/nothing", "config.json", "main", "hf_reader", "RepositoryNotFoundError: 404"),
        ("gpt2", "config.json", "v9", "", "RevisionNotFoundError: 404"),
        ("gpt2", "absent.json", "main", "", "EntryNotFoundError: 404"),
    ],
)
def test_what_is_absent(hub: Hub, tmp_path: Path, name: str, file: str, revision: str, token: str, error: str):
    path, message = download(hub, tmp_path, name, file, revision, token)
    assert path is None
    assert error in message


def test_cut_transfer_fails_and_is_resumed(tmp_path: Path):
    # The client keeps whole chunks of 10 MB, so only a larger file can be resumed in the middle.
    served = tmp_path / "root/models/large/model/main/model.safetensors"
    served.parent.mkdir(parents=True)
    served.write_bytes(random.Random(0).randbytes(12_000_000))
    with Hub(tmp_path / "root", cuts=[Cut("model.safetensors", after=11_000_000, times=1)]) as hub:
        path, message = download(hub, tmp_path, "large/model", "model.safetensors")
        assert path is None
        assert "IncompleteRead" in message
        path, _ = download(hub, tmp_path, "large/model", "model.safetensors")
        assert path.read_bytes() == served.read_bytes()
        assert [status for method, url, status, _ in hub.log if method == "GET" and "/large/" in url] == [200, 206]


def test_other_addresses_are_refused_and_noted(hub: Hub, tmp_path: Path):
    code = "import requests; requests.get('https://example.com/a')"
    assert "ProxyError" in client(hub, tmp_path, code).stderr
    client(hub, tmp_path, "import requests; requests.post('http://example.com/b')")
    client(hub, tmp_path, f"import requests; requests.head('{hub.url}/api/telemetry/x')")
    assert hub.escapes == ["CONNECT example.com:443", "POST http://example.com/b", "HEAD /api/telemetry/x"]


DATASET = """
import sys, json
from datasets import load_dataset
streaming = sys.argv[1] == "streaming"
splits = load_dataset("wikitext", "wikitext-2-raw-v1", streaming=streaming)
alpaca = load_dataset("tatsu-lab/alpaca", split="train", streaming=streaming)
print(json.dumps([{name: [row["text"] for row in split] for name, split in splits.items()}, list(alpaca)]))
"""


@pytest.mark.parametrize("mode", ["whole", "streaming"])
def test_datasets(hub: Hub, tmp_path: Path, mode: str):
    # By itself `datasets` counts downloads at an address outside the hub.
    done = client(hub, tmp_path, DATASET, mode, HF_UPDATE_DOWNLOAD_COUNTS="0")
    assert done.returncode == 0, done.stderr
    splits, alpaca = json.loads(done.stdout)
    folder = hub.root / "datasets/Salesforce/wikitext/main/wikitext-2-raw-v1"
    assert list(splits) == ["test", "train", "validation"]
    for name, texts in splits.items():
        assert texts == pq.read_table(folder / f"{name}-00000-of-00001.parquet")["text"].to_pylist()
        assert "" in texts
        assert any(text.startswith(" = ") for text in texts)
    assert list(alpaca[0]) == ["instruction", "input", "output", "text"]
    assert any(row["input"] for row in alpaca)
    assert hub.escapes == []
    assert any(status == 307 for *_, status, _ in hub.log)


MODELS = """
import json, sys
import transformers.modeling_utils
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
# transformers would ask a public service to convert weights that are only there in pickled form, as GPT-J's.
transformers.modeling_utils.auto_conversion = lambda *arguments, **options: None
found = {}
for name in sys.argv[1:]:
    model = (AutoModelForMaskedLM if "roberta" in name else AutoModelForCausalLM).from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = "A  statement, é \\n ☃ <0x41>"
    same = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    found[name] = [type(model).__name__, type(tokenizer).__name__, same, len(tokenizer) <= model.config.vocab_size]
print(json.dumps(found))
"""


def test_models(hub: Hub, tmp_path: Path):
    expected = {
        "gpt2": ["GPT2LMHeadModel", "GPT2TokenizerFast", True, True],
        "gpt2-xl": ["GPT2LMHeadModel", "GPT2TokenizerFast", True, True],
        "EleutherAI/gpt-j-6b": ["GPTJForCausalLM", "GPT2TokenizerFast", True, True],
        "EleutherAI/gpt-neox-20b": ["GPTNeoXForCausalLM", "GPTNeoXTokenizerFast", True, True],
        "huggyllama/llama-7b": ["LlamaForCausalLM", "LlamaTokenizerFast", True, True],
        "roberta-base": ["RobertaForMaskedLM", "RobertaTokenizerFast", True, True],
    }
    done = client(hub, tmp_path, MODELS, *expected)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
    assert hub.escapes == []
