"""What a native library shows and needs, whatever system it is for. A program: `exported_names.py FILE TARGET`.

`nox -s cross` runs it, with the package lief: the library may be for another system than this one.
"""

from __future__ import annotations

import re
import sys

import lief

OURS = re.compile(r"_?easydel_ragged_\w+")
SYSTEMS = {"linux": lief.ELF.Binary, "macos": lief.MachO.Binary, "windows": lief.PE.Binary}


def problems(path: str, target: str) -> list[str]:
    """What is wrong with the file for zig's name of its system, such as `x86_64-linux-gnu.2.17`."""
    library = lief.parse(path)
    _, system, abi = [*target.split("-"), ""][:3]
    if not isinstance(library, SYSTEMS[system]):
        return [f"a file for {system}: got {type(library).__name__}"]
    found = []
    names = {function.name for function in library.exported_functions}
    if isinstance(library, lief.ELF.Binary):
        names |= {symbol.name for symbol in library.exported_symbols}
    foreign = sorted(name for name in names if OURS.fullmatch(name) is None)
    if foreign or len(names) < 8:
        found.append(f"names: got {sorted(names)}, wanted those of easydel_ragged alone")
    if abi.startswith("gnu.") and isinstance(library, lief.ELF.Binary):
        newest = tuple(map(int, abi.removeprefix("gnu.").split(".")))
        for needed in library.symbols_version_requirement:
            for version in needed.get_auxiliary_symbols():
                number = re.fullmatch(r"GLIBC_([\d.]+)", version.name)
                if number is None or tuple(map(int, number[1].split("."))) > newest:
                    found.append(f"{needed.name}: got {version.name}, wanted at most {abi}")
        # What every glibc system has; no C++ runtime, which the interpreter may have in another version.
        allowed = re.compile(r"(libc|libm|libpthread|libdl|librt)\.so\.\d|ld-linux.*")
        found += [f"needs {name}" for name in library.libraries if allowed.fullmatch(name) is None]
    return found


def main(path: str, target: str) -> int:
    """Print what is wrong; 0 where nothing is."""
    found = problems(path, target)
    print("\n".join(found) or f"{path}: a library for {target}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
