"""A device that is not there is one clear error, before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from detgpt import DetGPT, InputError
from detgpt.device import choose_device


def test_without_a_wish_there_is_always_a_device():
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("given", ["cpu", torch.device("cpu")])
def test_a_device_that_is_there_is_taken(given):
    assert choose_device(given) == torch.device("cpu")


@pytest.mark.parametrize("wrong", ["cud", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_named(wrong):
    with pytest.raises(InputError, match=f"device='{wrong}' cannot be used"):
        choose_device(wrong)


def test_the_whole_model_says_so(tiny_pair_folder):
    with pytest.raises(InputError, match="device='cud' cannot be used"):
        DetGPT.from_pretrained(tiny_pair_folder, device="cud")
