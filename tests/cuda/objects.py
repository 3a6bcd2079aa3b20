"""What the compiler made of each kernel, read from the built module without a device.

`python -m tests.cuda.objects --write` writes the table that tests/cuda/test_objects.py compares, kernels.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from pathlib import Path

TABLE = Path(__file__).with_name("kernels.json")


@dataclass
class Kernel:
    """registers: of a thread. loads: instructions that load 16 bytes from memory. ahead: of those past the L1 cache,
    which are weights, keys and values, how many at most a thread issues before it waits for the first. spilled:
    instructions that reach for registers' overflow in memory."""

    registers: int = 0
    loads: int = 0
    ahead: int = 0
    spilled: int = 0


def module_path() -> Path | None:
    """The built module, or None."""
    spec = find_spec("flexidepth_ext._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def dump_tool() -> str | None:
    """cuobjdump: of the toolkit, or of the package nvidia-cuda-cuobjdump."""
    return shutil.which("cuobjdump", path=_search_path())


def _search_path() -> str:
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    folders = [str(folder) for folder in sorted(packages.glob("*/bin"))]
    return os.pathsep.join([os.environ.get("PATH", ""), *folders, "/usr/local/cuda/bin"])


def read_kernels(module: Path) -> dict[str, dict[str, Kernel]]:
    """{kernel: {architecture, as "90": what was made of it}}."""
    found: dict[str, dict[str, Kernel]] = {}
    arch = label = ""
    for line in _lines(module, "-res-usage"):
        if match := re.search(r"arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            label = kernel_label(match[1])
        elif match := re.match(r"\s*REG:(\d+)", line):
            found.setdefault(label, {})[arch] = Kernel(int(match[1]))
    archs = {arch for kernels in found.values() for arch in kernels}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process each, and they take their time
        list(pool.map(lambda arch: _count_instructions(module, arch, found), archs))
    return found


def _count_instructions(module: Path, arch: str, found: dict[str, dict[str, Kernel]]) -> None:
    kernel, flight = Kernel(), LoadsInFlight()
    for line in _lines(module, "-sass", "-arch", f"sm_{arch}"):
        if match := re.match(r"\s*Function : (\S+)", line):
            kernel, flight = found[kernel_label(match[1])][arch], LoadsInFlight()
        elif match := re.match(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);", line):
            name, operands = match[1], match[2]
            flight.follow(name, operands)
            kernel.ahead = flight.most
            kernel.loads += bool(re.match(r"LDG\.E\.(\w+\.)*128", name))
            kernel.spilled += name.startswith(("LDL", "STL"))


class LoadsInFlight:
    """Follows a kernel's instructions from the first to the last: how many 16-byte loads past the L1 cache are under
    way before one of their results is used. Where a branch is, none is taken to be."""

    def __init__(self) -> None:
        self.most = 0
        self._first_registers: list[int] = []  # of each load, the oldest first

    def follow(self, name: str, operands: str) -> None:
        """One instruction, its destination first."""
        if re.match(r"BRA|BRX|EXIT|RET|CALL|BSYNC|JMP", name):
            self._first_registers.clear()
            return
        destination, _, sources = operands.partition(",")
        if name.startswith(("ST", "RED")):  # they have none
            sources = operands
        used = {int(number) for number in re.findall(r"\bR(\d+)", sources)}
        for place in reversed(range(len(self._first_registers))):
            first = self._first_registers[place]
            if used & set(range(first, first + 4)):  # it has come, and so have those before it
                del self._first_registers[: place + 1]
                break
        if re.match(r"LDG\.E\.NA\.(\w+\.)*128", name):
            self._first_registers.append(int(destination.removeprefix("R")))
            self.most = max(self.most, len(self._first_registers))


def kernel_label(mangled: str) -> str:
    """`matvec_kernel<BFloat16, 4, Outputs>` out of the name in the object."""
    match = re.search(r"\d+([a-z][a-z_]*_kernel)(.*)", mangled)
    if match is None:
        return mangled
    name, rest = match.groups()
    if not rest.startswith("I"):
        return name
    rest = re.sub(r"^If", "I5float", rest)
    parts = re.findall(r"BFloat16|Float16|float|Outputs|Activation|Projection|Li\d+", rest)
    kept = [parts[0], *(p for p in parts[1:] if p not in ("BFloat16", "Float16"))]
    kept = [p.removeprefix("Li") for p in kept]
    return f"{name}<{', '.join(dict.fromkeys(kept))}>"


def _lines(module: Path, *options: str) -> Iterator[str]:
    tool = dump_tool()
    assert tool is not None
    environment = {**os.environ, "PATH": _search_path()}  # it calls nvdisasm
    with subprocess.Popen(
        [tool, *options, str(module)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0, f"{tool} {' '.join(options)}: exit code {process.returncode}"


def compiler_version() -> str:
    """Of the toolkit that built the module, as "13.0"."""
    from flexidepth_ext import _cuda  # type: ignore[attr-defined]

    number = int(_cuda.find_devices()["runtime_version"])
    return f"{number // 1000}.{number % 1000 // 10}"


def table() -> dict[str, object]:
    """What is committed."""
    module = module_path()
    assert module is not None
    kernels = {
        label: {arch: astuple(kernel) for arch, kernel in sorted(archs.items())}
        for label, archs in sorted(read_kernels(module).items())
    }
    return {
        "compiler": compiler_version(),
        "columns": ["registers", "16-byte loads", "loads in flight", "spill instructions"],
        "kernels": kernels,
    }


def as_text(content: dict[str, object]) -> str:
    """A kernel a line."""
    kernels = content["kernels"]
    assert isinstance(kernels, dict)
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kernels.items()]
    head = {k: v for k, v in content.items() if k != "kernels"}
    begin = json.dumps(head, indent=1)[:-2]
    return begin + ',\n "kernels": {\n' + ",\n".join(lines) + "\n }\n}\n"


if __name__ == "__main__":
    text = as_text(table())
    if "--write" in sys.argv[1:]:
        TABLE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
