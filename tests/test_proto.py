"""The committed stubs are what the .proto gives, and every field of the contract says what it means."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
STUBS = ("policy_pb2.py", "policy_pb2.pyi", "policy_pb2_grpc.py")


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stubs as the installed generator makes them, by the command that README gives."""
    out = tmp_path_factory.mktemp("stubs")
    flags = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    well_known = str(resources.files("grpc_tools") / "_proto")
    command = ["protoc", f"-Iserving={ROOT / 'proto'}", f"-I{well_known}", *flags, "serving/policy.proto"]
    assert protoc.main(command) == 0
    return out / "serving"


@pytest.mark.parametrize("name", STUBS)
def test_the_committed_stubs_are_what_the_proto_gives(regenerated: Path, name: str) -> None:
    assert (ROOT / "serving" / name).read_text() == (regenerated / name).read_text()


def test_every_field_of_a_request_says_its_bounds() -> None:
    text = (ROOT / "proto" / "policy.proto").read_text()
    for message in ("HistoryEntry", "Candidate", "RecommendRequest"):
        body = re.search(rf"message {message} {{\n(.*?)\n}}", text, re.DOTALL)
        assert body is not None
        for line in body.group(1).splitlines():
            assert re.search(r"= \d+; *// \S", line), line
