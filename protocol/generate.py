"""Generates the gRPC stubs beside their .proto files: `make proto`. A test runs it into a folder of its own and compares."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

PROTO_FOLDER = Path(__file__).parent / "v1"


def generate(target: Path) -> list[Path]:
    """Writes the stubs of every .proto file into target; returns them, sorted.

    Raises RuntimeError where protoc refuses a file (it prints why itself).
    """
    import grpc_tools.protoc

    with tempfile.TemporaryDirectory() as folder:
        # a tree named halfmoon, whatever the checkout is called, so that the stubs import halfmoon.protocol.v1
        source = Path(folder, "halfmoon", "protocol", "v1")
        shutil.copytree(PROTO_FOLDER, source, ignore=shutil.ignore_patterns("*.py", "*.pyi", "__pycache__"))
        names = [f"halfmoon/protocol/v1/{path.name}" for path in sorted(source.glob("*.proto"))]
        includes = [f"-I{folder}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        if grpc_tools.protoc.main(["protoc", *includes, *outputs, *names]) != 0:
            raise RuntimeError("protoc failed")
        target.mkdir(parents=True, exist_ok=True)
        return sorted(Path(shutil.copy(path, target)) for path in source.glob("*_pb2*"))


if __name__ == "__main__":
    written = generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO_FOLDER)
    sys.stdout.write("".join(f"{path}\n" for path in written))
