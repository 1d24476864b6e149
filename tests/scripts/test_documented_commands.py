"""Every command of README.md and docs/, as it stands there, on simulated cards and offline.

The original commands are in tests/specification/specification.json. The pages may differ from them only in where the
launcher is and in real paths for placeholders; what is run here is read out of the pages. The names in the commands
are served by a hub on loopback (tests/hub). The commands write to /tmp and to the folder they are run in: each gets a
/tmp of its own in a mount namespace; where those are forbidden, they write to the real one, one after the other.
"""

import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from documentation import code_blocks, large_commands, read_pages
from hub.fixtures import stand_in_hub
from hub.server import Hub
from hub.stand_ins import POSITIONS
from launcher.hosts import SimulatedHost, two_hosts
from transformers import AutoTokenizer

REPOSITORY = Path(__file__).parents[2]
SPECIFICATION = json.loads((REPOSITORY / "tests/specification/specification.json").read_text())
COMMANDS = {Path(entry["config"]).stem: "\n".join(entry["command"]) for entry in SPECIFICATION["commands"]}
BLOCKS = code_blocks("bash")
LARGE = large_commands()  # executed by tests/simulator/test_large_commands.py
PLACEHOLDER = re.compile(r"path_(?:to|for)_\w+")
# The only command that is shortened: one step and four samples of 32 tokens, for a model of 657 million parameters.
SHORTENED = " --max_steps 1 --max_eval_samples 4 --block_size 32"


def allowed_forms(command: str) -> re.Pattern:
    """What the documentation may print for a command of the specification."""
    literal = command.replace("../gaudi_spawn.py", "gaudi_spawn.py")
    return re.compile(r"[\w./-]+".join(map(re.escape, PLACEHOLDER.split(literal))))


def documented(name: str) -> str:
    """The block of the documentation that is a command of the specification."""
    (block,) = [block for block in BLOCKS if allowed_forms(COMMANDS[name]).fullmatch(block)]
    return block


def words(command: str) -> list[str]:
    """The words that bash would pass on."""
    return shlex.split(command.replace("\\\n", ""))


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_printed_once(name: str):
    assert len([block for block in BLOCKS if allowed_forms(COMMANDS[name]).fullmatch(block)]) == 1


def test_the_deepspeed_configuration_is_printed():
    (shown,) = code_blocks("json")
    configurations = [
        json.loads((REPOSITORY / f"configs/deepspeed/zero_{stage}.json").read_text()) for stage in (1, 2, 3)
    ]
    assert json.loads(shown) == configurations[1] == SPECIFICATION["deepspeed"]
    assert [configuration["zero_optimization"]["stage"] for configuration in configurations] == [1, 2, 3]


def test_every_configuration_file_is_listed():
    listed = re.findall(r"^\| .* \| `(configs/\w+\.json)` \|$", read_pages(), re.MULTILINE)
    assert sorted(listed) == sorted(f"configs/{name}.json" for name in [*COMMANDS, *LARGE])
    assert sorted(listed) == sorted(f"configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.json"))


PARSE = """
import importlib, json, re, sys
arguments = json.loads(sys.stdin.read())
sys.argv[1:] = ["--use_habana"]
found = []
for script, file, flags in arguments:
    module = importlib.import_module(script)
    parse = module.parse
    pair = []

    class Parsed(Exception):
        pass

    def capture(argv, *types):
        # The default of logging_dir holds the time, and some objects are shown by their address.
        parts = [vars(part) for part in parse(argv, *types)]
        shown = [{k: re.sub("0x[0-9a-f]+", "", repr(v)) for k, v in p.items() if k != "logging_dir"} for p in parts]
        pair.append(shown)
        raise Parsed

    module.parse = capture
    for argv in (file, flags):
        try:
            module.main(argv)
        except Parsed:
            pass
    module.parse = parse
    found.append(pair)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_files_and_commands_parse_to_the_same_arguments(tmp_path: Path):
    asked = []
    for name in [*COMMANDS, *LARGE]:
        command = words(LARGE[name] if name in LARGE else documented(name))
        index = next(number for number, word in enumerate(command) if word.startswith("run_"))
        flags, changed = command[index + 1 :], []
        if "--context_parallel_size" in flags:  # more than there are ranks here
            config = json.loads((REPOSITORY / f"configs/{name}.json").read_text())
            assert str(config["context_parallel_size"]) == flag(flags, "context_parallel_size")
            changed = ["--context_parallel_size", "1"]
        asked.append([Path(command[index]).stem, [f"configs/{name}.json", *changed], flags + changed])
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "GAUDI_SIMULATOR": "1"}
    launched = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(asked),
        cwd=REPOSITORY,
        env=os.environ | offline | launched,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (_, file, _), (from_file, from_flags) in zip(asked, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert from_file == from_flags, file


UNSHARE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
NAMESPACES = subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
heavy = pytest.mark.xdist_group("heavy")
# Eight ranks on two cores take their time, and longer beside other work.
pytestmark = [pytest.mark.timeout(900), *([] if NAMESPACES else [heavy])]


@dataclass
class Sandbox:
    """A folder with copies of the scripts and configurations, and a /tmp of its own.

    The command sees `root` as /tmp. It runs in /tmp/work; the hub's cache is in /tmp/home.
    """

    root: Path
    hub: Hub

    def __post_init__(self) -> None:
        for folder in ("work", "home"):
            (self.root / folder).mkdir()
        for script in [*REPOSITORY.glob("run_*.py"), REPOSITORY / "gaudi_spawn.py"]:
            shutil.copy(script, self.root / "work")
        shutil.copytree(REPOSITORY / "configs", self.root / "work/configs")

    def path(self, output_dir: str) -> Path:
        """Where a path as the command names it really is."""
        if not output_dir.startswith("/tmp/"):
            return self.root / "work" / output_dir
        return self.root / output_dir.removeprefix("/tmp/") if NAMESPACES else Path(output_dir)

    def mounts(self, *needed: Path) -> str:
        """A shell script that puts this folder in the place of /tmp.

        What lies below /tmp and is still needed, as this repository in some checkouts, is mounted again.
        """
        needed = [path for path in (REPOSITORY, Path(sys.prefix), *needed) if path.is_relative_to("/tmp")]
        places = {str(path): f"{self.root}/{path.relative_to('/tmp')}" for path in needed}
        again = [f"mkdir -p {target}; mount --rbind {path} {target}" for path, target in places.items()]
        return "; ".join(["set -e", *again, f"mount --rbind {self.root} /tmp"])

    def run(self, command: str, seconds: int, host: SimulatedHost | None = None) -> subprocess.CompletedProcess:
        """Run a command by bash, on 8 simulated cards, with the hub as the only address that can be reached."""
        home = "/tmp" if NAMESPACES else str(self.root)
        environment = self.hub.environment(Path(home, "home")) | {"GAUDI_SIMULATOR": "8"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        shell = ["bash", "-e", "-c", command]
        if host:
            shell = host.inside("bash", "-c", 'cd /tmp/work; exec "$@"', "bash", *shell)
        elif NAMESPACES:
            shell = [*UNSHARE, "bash", "-c", f'{self.mounts()}; cd /tmp/work; exec "$@"', "bash", *shell]
        process = subprocess.Popen(
            shell,
            cwd=self.root / "work",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=60)
            pytest.fail(f"no end after {seconds} s: {stderr[-5000:]}")
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.fixture
def sandbox(tmp_path: Path, hub: Hub) -> Iterator[Sandbox]:
    real = [] if NAMESPACES else {Path(match) for match in re.findall(r"/tmp/test-\w[\w-]*", "\n".join(BLOCKS))}
    assert [path for path in real if path.exists()] == [], "a documented command would write into a folder of yours"
    yield Sandbox(tmp_path, hub)
    for path in real:
        shutil.rmtree(path, ignore_errors=True)


def wikitext(hub: Hub, split: str) -> list[str]:
    folder = hub.root / "datasets/Salesforce/wikitext/main/wikitext-2-raw-v1"
    return pq.read_table(folder / f"{split}-00000-of-00001.parquet")["text"].to_pylist()


def flag(command: list[str], name: str, default: str = "") -> str:
    return command[command.index(f"--{name}") + 1] if f"--{name}" in command else default


def check_output(command: str, sandbox: Sandbox, ranks: int) -> dict:
    """Check what every documented run leaves behind; returns all its figures."""
    command = words(command)
    folder = sandbox.path(flag(command, "output_dir"))
    results = json.loads((folder / "all_results.json").read_text())
    if "--do_train" in command:
        weights = "adapter_model" if "run_lora_clm.py" in command else "model"
        files = [f"{weights}.safetensors", "tokenizer.json", "trainer_state.json", "loss_curve.png", "README.md"]
        assert [name for name in files if not (folder / name).is_file()] == []
        state = json.loads((folder / "trainer_state.json").read_text())
        assert 0 < results["train_loss"] < math.inf
        steps = int(flag(command, "max_steps", "0"))
        if not steps:
            batches = math.ceil(results["train_samples"] / (ranks * int(flag(command, "per_device_train_batch_size"))))
            steps = 3 * math.ceil(batches / int(flag(command, "gradient_accumulation_steps", "1")))
        assert state["global_step"] == steps
        # The three steps of --throughput_warmup_steps are not counted.
        assert ("train_tokens_per_second" in results) == (steps > 3)
    if "--do_eval" in command:
        assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
        assert 0 <= results["eval_accuracy"] <= 1
    assert sandbox.hub.escapes == []
    return results


SINGLE_CARD = [
    "clm_gpt2",
    "clm_gpt2_own_files",
    "clm_gpt2_pretraining",
    "clm_gpt2_inference",
    "clm_gpt2_streaming",
    "mlm_roberta",
    "mlm_roberta_own_files",
    "lora_llama",
]
EIGHT_CARDS = [
    "clm_gpt2_8_cards",
    "clm_gptj_8_cards_deepspeed",
    "clm_gpt2_xl_8_cards_deepspeed",
    "mlm_roberta_8_cards",
    "lora_llama_8_cards",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE_CARD)
def test_single_card(name: str, sandbox: Sandbox):
    command = documented(name)
    if "own_files" in name:
        texts = {"train_file": wikitext(sandbox.hub, "train"), "validation_file": wikitext(sandbox.hub, "validation")}
        for flag_name, rows in texts.items():
            (sandbox.root / f"work/{flag_name}.txt").write_text("\n".join(row.strip() for row in rows))
            command = command.replace(f"path_to_{flag_name}", f"{flag_name}.txt")
    done = sandbox.run(command, 600)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "INFO 1 card," in done.stderr
    results = check_output(command, sandbox, ranks=1)
    if name in ("clm_gpt2", "clm_gpt2_pretraining"):
        # By the plain definition: tokenise each text, join, cut.
        tokenizer = AutoTokenizer.from_pretrained(sandbox.hub.root / "models/openai-community/gpt2/main")
        for split, figure in (("train", "train_samples"), ("validation", "eval_samples")):
            tokens = sum(len(tokenizer(text)["input_ids"]) for text in wikitext(sandbox.hub, split))
            assert results[figure] == tokens // POSITIONS
    if name == "clm_gpt2_inference":
        assert sorted(path.name for path in (sandbox.root / "test-clm").iterdir()) == [
            "all_results.json",
            "eval_results.json",
        ]


@pytest.mark.slow
@heavy
@pytest.mark.parametrize("name", EIGHT_CARDS)
def test_eight_cards(name: str, sandbox: Sandbox):
    command = documented(name)
    done = sandbox.run(command, 900)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "INFO 8 cards," in done.stderr
    check_output(command, sandbox, ranks=8)


@pytest.mark.slow
@heavy
def test_sixteen_cards_on_two_hosts(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, stand_ins: Path):
    keys = tmp_path_factory.mktemp("hosts")
    with two_hosts(keys) as hosts:
        network = {"address": hosts[0].address, "namespace": hosts[0].process.pid}
        with stand_in_hub(stand_ins, **network) as hub:
            sandbox = Sandbox(tmp_path, hub)
            for host in hosts:
                host.run("bash", "-c", sandbox.mounts(keys))
            lines = "".join(f"{host.name} slots=8\n" for host in hosts)
            (sandbox.root / "work/hostfile").write_text(lines)
            command = documented("clm_gptneox_16_cards_deepspeed").replace("path_to_my_hostfile", "hostfile")
            done = sandbox.run(command, 1100, hosts[0])
            assert done.returncode == 0, done.stderr[-5000:]
            assert "INFO 16 cards," in done.stderr
            check_output(command, sandbox, ranks=16)


@pytest.mark.slow
@heavy
def test_model_made_on_the_fly(sandbox: Sandbox):
    command = documented("clm_gpt2_config_overrides") + SHORTENED
    done = sandbox.run(command, 900)
    assert done.returncode == 0, done.stderr[-5000:]
    results = check_output(command, sandbox, ranks=1)
    assert results["eval_samples"] == 4
    folder = sandbox.path("/tmp/test-clm")
    config = json.loads((folder / "config.json").read_text())
    assert (config["n_embd"], config["n_head"], config["n_layer"], config["n_positions"]) == (1024, 16, 48, 1024)
    weights = sum(math.prod(shape) for name, shape in shapes(folder / "model.safetensors") if name != "lm_head.weight")
    # 12 squares of the width in each layer, embeddings of positions and tokens (also the head), biases, norms.
    assert weights == 48 * (12 * 1024**2 + 13 * 1024) + (1024 + config["vocab_size"]) * 1024 + 2 * 1024
    assert (folder / "checkpoint-1/optimizer.pt").stat().st_size > 2 * 4 * weights
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    assert gigabytes < 24


def shapes(weights: Path) -> list[tuple[str, list[int]]]:
    """The names and shapes in a safetensors file, read from its header."""
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [(name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clm_gptj_8_cards_deepspeed", "lora_llama"])
def test_use_cpu_appended(name: str, sandbox: Sandbox):
    command = documented(name)
    script = "python " + command[command.index("run_") :] + " --use_cpu --max_steps 2"
    done = sandbox.run(script, 600)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "--use_cpu overrides --use_habana" in done.stderr
    assert "SIMULATED" not in done.stderr
    check_output(script, sandbox, ranks=1)


OTHER_BLOCKS = [
    block
    for block in BLOCKS
    if block not in LARGE.values() and not any(allowed_forms(c).fullmatch(block) for c in COMMANDS.values())
]


@pytest.mark.slow
@heavy
@pytest.mark.parametrize("block", OTHER_BLOCKS)
def test_other_commands(block: str, sandbox: Sandbox):
    done = sandbox.run(block, 600)
    assert done.returncode == 0, done.stderr[-5000:]
    assert sandbox.hub.escapes == []
