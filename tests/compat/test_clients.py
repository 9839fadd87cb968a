"""`make clients` tells right from wrong; those of its uses whose packages are here run fused, and as stock answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import models
from tests.compat import clients, clients_uses
from tests.compat.environments import LEFT_OUT, REQUIRED


def tried(monkeypatch: pytest.MonkeyPatch, run: clients_uses.Run, runs: str = "packed") -> dict[str, Any]:
    monkeypatch.setitem(clients_uses.USES, "tried", clients_uses.Use("torch", runs, run))
    return clients_uses.record("tried")


def forward(ready: clients_uses.Ready, after: float = 0.0) -> dict[str, Any]:
    """One forward of a padded batch; what is added to the fused model's result is wrong."""
    model, mask = ready(models.seeded()), models.masks(4, 13)["right"]
    assert mask is not None
    with torch.no_grad():
        rows = model(models.ids(4, 13), mask).last_hidden_state[mask.bool()]
    return {"rows": rows + after * hasattr(model.encoder, "fastbert")}


def test_a_use_that_agrees_counts_its_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(monkeypatch, forward)
    assert found["agrees"] and "error" not in found
    assert (found["packed"], found["dense"], found["stock"]) == (1, 0, 0)
    assert 0 < found["fused_error"] < 1e-6 and found["values"] > 1000


def test_a_use_that_differs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(monkeypatch, lambda ready: forward(ready, 1e-3))
    assert not found["agrees"] and "exceeds the bound" in found["error"]


def test_a_use_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(monkeypatch, lambda ready: {"x": torch.zeros(2) / ready(nn.Identity())})
    assert not found["agrees"] and found["error"].startswith("TypeError")


def test_a_use_that_never_runs_as_expected_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(monkeypatch, forward, runs="dense")
    assert found["agrees"] and found["error"] == "no forward ran dense"


def test_other_names_are_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(monkeypatch, lambda ready: {str(type(ready(models.seeded()))): [1.0]})
    assert not found["agrees"] and "other names than the truth has" in found["error"]


def test_the_network_is_out_of_reach() -> None:
    import socket

    with clients_uses.offline(), socket.socket() as one, pytest.raises(OSError, match="reached for the network"):
        one.connect(("127.0.0.1", 9))


@pytest.mark.parametrize(
    "record", [{"agrees": True}, {"agrees": False, "error": "off"}, {"agrees": True, "error": "x"}]
)
def test_the_exit_status(capsys: pytest.CaptureFixture[str], record: dict[str, Any]) -> None:
    about = {"package": "captum", "version": "0.9.0", "use": "some", "packed": 3, "dense": 1, "stock": 2}
    assert clients.render([{**about, "why stock": {"a hook": 2}, **record}]) == int("error" in record)
    printed = capsys.readouterr().out
    yes = "yes" if record["agrees"] else "no"
    assert f"| captum | 0.9.0 | some | {yes} | 3 | 1 | 2 | a hook |" in printed
    assert all(client.split()[0] in printed for client in LEFT_OUT)


def test_every_use_has_an_environment_and_every_package_a_use() -> None:
    packages = {use.package for use in clients_uses.USES.values()}
    assert {clients.environment_of(package) in REQUIRED for package in packages} == {True}
    assert {use.runs for use in clients_uses.USES.values()} == {"packed", "dense", "stock"}


# Those whose packages the tests' own environment has, one of each kind; what others of the tests do, too, is slow.
HERE = [
    *(f"sentence_transformers_{name}" for name in ("cnn", "late_interaction", "splade")),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("sentence_transformers_encode", "sentence_transformers_cross_encoder")
    ),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("peft_lora", "peft_prompt_tuning")),
]


@pytest.mark.parametrize("name", HERE)
def test_a_use_whose_package_is_here(name: str) -> None:
    found = clients_uses.record(name)
    assert found["agrees"] and "error" not in found, found["error"]
