"""What people bring for instruction tuning: run_lora_clm.py knows it by its columns, and says so."""

import json

import pytest
from datasets import Dataset
from running import run_several
from tokenised import tokenised
from transformers import AutoTokenizer

from gaudi_lm.data.instructions import show_targets
from gaudi_lm.data.prompts import find_format

ASK, SAY = "Explain part {}.", "Assert statements are a convenient way to insert part {}."
MESSAGES = [{"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}]
SHAREGPT = [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]
ALPACA = {"instruction": ASK, "input": "", "output": SAY}
IN_ALPACA = "### Instruction:\nExplain part 0.\n\n### Response:>>>Assert"
# name: row, what the log says of the columns, and of what is learnt
CASES = {
    "alpaca": (ALPACA, "instruction (instruction from 'instruction', input from 'input', output from 'output')", ""),
    "number": ({**ALPACA, "output": 85}, "instruction (", "### Response:>>>85"),
    "boolean": ({**ALPACA, "output": True}, "instruction (", "### Response:>>>true"),
    "dolly": (
        {"instruction": ASK, "context": "The manual.", "response": SAY, "category": "open_qa"},
        "instruction (instruction from 'instruction', input from 'context', output from 'response')",
        "### Input:\nThe manual.\n\n### Response:>>>Assert",
    ),
    "completion": (
        {"prompt": ASK, "completion": SAY}, "instruction (instruction from 'prompt', output from 'completion')", "",
    ),
    "response": (
        {"prompt": ASK, "response": SAY}, "instruction (instruction from 'prompt', output from 'response')", "",
    ),
    "answer": (
        {"question": ASK, "answer": SAY}, "instruction (instruction from 'question', output from 'answer')", "",
    ),
    "messages": ({"messages": MESSAGES}, "messages (messages from 'messages')", "<|assistant|>>>>Assert"),
    "text": ({"messages": json.dumps(MESSAGES)}, "messages (messages from 'messages')", "<|assistant|>>>>Assert"),
    "sharegpt": ({"conversations": SHAREGPT}, "messages (messages from 'conversations')", "<|assistant|>>>>Assert"),
    "two lists": (
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        "messages (prompt from 'prompt', completion from 'completion')", "<|assistant|>>>>Assert",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(instructions):
    return AutoTokenizer.from_pretrained(instructions.llama)


@pytest.mark.parametrize("case", CASES)
def test_columns(tokenizer, case):
    row, columns, learnt = CASES[case]
    data = Dataset.from_list([json.loads(json.dumps(row).replace("part {}", f"part {number}")) for number in range(3)])
    example_format = find_format(data)
    assert str(example_format).startswith(columns)
    rows = tokenised(tokenizer, data, 128)
    assert len(rows) == 3
    for number, found in enumerate(rows.with_format("numpy")):
        shown = show_targets(found, tokenizer)
        assert (learnt or IN_ALPACA).replace("part 0", f"part {number}") in shown
        assert shown.endswith("</s><<<")


@pytest.mark.slow
def test_files(instructions, tmp_path):
    """The log names the columns; what cannot be read is left out and named; each split is of its own kind."""
    talk = [{"conversations": SHAREGPT}] * 4
    alpaca = [ALPACA] * 6
    files = {
        "null.jsonl": [*talk, {"conversations": None}],
        "mixed.jsonl": [*alpaca, *({**ALPACA, "output": value} for value in ("a", 5, ["b"], {"c": 1}))],
        "lists.jsonl": [{**ALPACA, "output": ["a"]}],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "empty.csv").write_text('instruction,input,output\n"Explain part 0.",,"Assert"\n"b",,"c"\n')
    runs = [
        [
            "--model_name_or_path", instructions.llama, "--train_file", tmp_path / name, "--output_dir",
            tmp_path / f"out-{name}", "--train_on_inputs", "False", "--do_train", "--use_cpu", "--max_steps", 1,
            "--save_strategy", "no", "--cache_dir", tmp_path / "cache",
        ]
        for name in [*files, "empty.csv"]
    ]  # fmt: skip
    runs[0] += ["--do_eval", "--validation_file", tmp_path / "mixed.jsonl"]
    null, mixed, lists, empty = run_several("run_lora_clm", runs)
    assert [end.status for end in (null, mixed, lists, empty)] == [0, 0, 2, 0], (null.log, mixed.log, empty.log)
    assert "examples: messages (messages from 'conversations'); instruction (instruction from" in null.log
    assert "validation: 8 examples" in null.log
    assert "train: 1 of 5 examples left out: row 5: there is no conversation" in null.log
    assert "<|assistant|>>>>Assert" in null.log
    assert (
        "2 of 10 examples left out: row 9: column 'output' has a list, not text; row 10: column 'output' has a dict"
    ) in mixed.log
    assert "train: 8 examples" in mixed.log
    assert lists.log.splitlines()[-1].startswith("error: --output_column_name output, row 1: a list, not text")
    assert repr(IN_ALPACA)[1:-1] in empty.log and "train: 2 examples" in empty.log
