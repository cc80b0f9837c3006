"""Names: what is there by default, what a selection leaves, what an unknown name is told."""

from __future__ import annotations

import pytest

from benchmarks import registry
from benchmarks.__main__ import main
from benchmarks.registry import Selection
from fastldm.dispatch import OPS
from fastldm.errors import InputError


def test_every_operation_is_there():
    assert set(registry.operations("ops")) == set(OPS)


@pytest.mark.parametrize("group", registry.GROUPS)
def test_defaults_are_known_names(group):
    for op in registry.operations(group).values():
        assert set(op.full) <= set(op.shapes)
        assert set(op.dtypes) <= set(registry.DTYPES)
        assert set(op.default_layouts) <= set(op.layouts)
        assert set(op.default_directions) <= set(op.directions) <= set(registry.DIRECTIONS)
        names = [provider.name for provider in op.providers()]
        assert len(set(names)) == len(names)
        assert op.torch in names
        assert any(provider.ours for provider in op.providers())


def test_a_name_picks_the_operations_that_know_it():
    cases = registry.cases("ops", Selection(shapes=("sd15-8px-text-d160",), dtype=("float32",)))
    assert {(case.op, case.direction) for case in cases} == {
        ("attention", "forward"),
        ("attention", "forward+backward"),
    }
    cases = registry.cases("ops", Selection(provider=("faiss",)))
    assert {case.op for case in cases} == {"vq_nearest"}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(op=("atention",)), "unknown operation 'atention'; use one of: attention, group_norm"),
        (Selection(shapes=("sd16",)), "unknown shape 'sd16'; use one of: .*sd15-64px-self-d40"),
        (Selection(op=("group_norm",), shapes=("vqgan-4096",)), "unknown shape 'vqgan-4096'"),
        (Selection(dtype=("float8",)), "unknown dtype 'float8'; use one of: float32"),
        (Selection(layout=("nhwc",)), "unknown layout 'nhwc'; use one of: .*channels-last"),
        (Selection(direction=("sideways",)), "unknown direction 'sideways'"),
        (Selection(provider=("triton3",)), "unknown provider 'triton3'; use one of: fastldm-auto"),
        (Selection(shapes=("vqgan-4096",), direction=("backward",)), "has all of these names"),
    ],
)
def test_unknown_names_list_what_exists(selection, message):
    with pytest.raises(InputError, match=message):
        registry.cases("ops", selection)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--shapes", "no-such-shape"],
        ["run", "--provider", "no-such-provider"],
        ["run", "--op", "no-such-op"],
        ["run", "--device", "no-such-device"],
        ["run", "--out", "no/such/folder/a.json", "--op", "attention"],
        ["compare", "no-such-revision", "--op", "attention"],
        ["plot", "no-such-file.json"],
        ["run", "--rounds", "0"],
        ["measure"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks: error: ")
    assert error.count("\n") == 1
