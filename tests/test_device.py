import pytest
import torch

from medseg_diff.device import autocast, choose_device, fast_in_bf16
from medseg_diff.errors import UserError

CPU = torch.device("cpu")


def test_a_device_by_name_and_by_default():
    assert choose_device("cpu") == CPU
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["foo", "cuda:99", "meta", "hpu", "vulkan", "cpu:-2", "x" * 10_000])
def test_a_device_that_is_not_there_is_said(name: str):
    with pytest.raises(UserError, match=f"--device {name}.*no such device.*Use cpu"):
        choose_device(name)


def test_precision_is_what_was_asked_for():
    x = torch.ones(2, 2)
    for precision, dtype in (
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("auto", torch.bfloat16 if fast_in_bf16(CPU) else torch.float32),
    ):
        with autocast(CPU, precision):
            assert (x @ x).dtype == dtype


def test_bf16_is_fast_where_the_processor_has_instructions_for_it(monkeypatch: pytest.MonkeyPatch):
    for capability in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=capability: {name: True})
        assert fast_in_bf16(CPU)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert not fast_in_bf16(CPU)
    assert not fast_in_bf16(torch.device("meta"))
