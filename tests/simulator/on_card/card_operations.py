"""The operations that training uses, recorded from it: each gives on the card what it gives on the CPU, to the bit."""

import torch
from tiny_models import VOCABULARY, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MODELS = ["gpt2", "gptj", "gpt_neox", "llama", "bert", "roberta", "distilbert", "albert"]
LEAST_OPERATIONS = 200


def freeze(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def signature(value):
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype, value.stride())
    return str(value)


class Record(TorchDispatchMode):
    """Keeps one call of each operation with operands of the same shapes, dtypes and layouts."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, _ = tree_flatten((args, kwargs))
        key = (str(operation), *map(signature, leaves))
        if key not in self.calls:
            self.calls[key] = (operation, tree_map(freeze, args), tree_map(freeze, kwargs))
        return operation(*args, **kwargs)


def train(model_type: str, attention: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(model_type, attn_implementation=attention)
    tokens = torch.randint(3, VOCABULARY, (2, 12))
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, foreach=model_type != "gpt2")
    for _ in range(2):
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def same(got, wanted) -> bool:
    if isinstance(wanted, torch.Tensor):
        strides, got = got.stride(), got.cpu()
        both_nan = wanted.isnan() & got.isnan() if wanted.is_floating_point() else torch.zeros((), dtype=torch.bool)
        return (
            got.dtype == wanted.dtype
            and got.shape == wanted.shape
            and strides == wanted.stride()
            and bool(((got == wanted) | both_nan).all())
        )
    return got == wanted


def test_recorded_operations_are_the_cpus():
    with Record() as record:
        for model_type in MODELS:
            for attention in ("eager", "sdpa"):
                train(model_type, attention)
    assert len({str(operation) for operation, *_ in record.calls.values()}) > 60
    assert len(record.calls) >= LEAST_OPERATIONS
    wrong = []
    for operation, args, kwargs in record.calls.values():
        if "empty" in str(operation):
            continue  # the values are nobody's
        on_host = tree_map(freeze, (args, kwargs))
        on_card = tree_map(
            lambda value: value.to("hpu") if isinstance(value, torch.Tensor) else torch.device("hpu")
            if isinstance(value, torch.device) else value,
            (args, kwargs),
        )  # fmt: skip
        torch.manual_seed(5)
        torch.hpu.manual_seed(5)
        wanted = operation(*on_host[0], **on_host[1])
        got = operation(*on_card[0], **on_card[1])
        pairs = zip(tree_flatten((got, on_card))[0], tree_flatten((wanted, on_host))[0], strict=True)
        if not all(same(x, y) for x, y in pairs if isinstance(y, (torch.Tensor, int, float, bool))):
            wrong.append(f"{operation} {[signature(leaf) for leaf in tree_flatten((args, kwargs))[0]]}")
    assert not wrong, f"{len(wrong)} of {len(record.calls)}:\n" + "\n".join(wrong[:20])
