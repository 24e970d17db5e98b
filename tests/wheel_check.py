"""Whether wheels hold what their names say, whatever system they are for. A program: `wheel_check.py WHEEL...`.

`nox -s wheels` runs it, with the package lief: one native library in each, which needs nothing but the oldest system of
the wheel's tag, and shows no names but its own.
"""

from __future__ import annotations

import re
import sys
import tempfile
import zipfile
from pathlib import Path

import lief

OURS = re.compile(r"_?easydel_ragged_\w+")
# What every system of the kind has; no C++ runtime, which the interpreter may have in another version.
GLIBC = re.compile(r"(libc|libm|libpthread|libdl|librt)\.so\.\d|ld-linux.*")
MACOS = re.compile(r"/usr/lib/libSystem\.B\.dylib")
WINDOWS = re.compile(r"KERNEL32\.dll|ntdll\.dll|api-ms-win-crt-[\w-]+\.dll", re.IGNORECASE)
# zig's linker gives them to each library of macOS.
OF_ZIG = {"__mh_dylib_header", "___dso_handle"}
SUFFIXES = {"manylinux": "so", "macosx": "dylib", "win": "dll"}
PROCESSORS: dict[str, tuple[object, ...]] = {
    "x86_64": (lief.ELF.ARCH.X86_64, lief.MachO.Header.CPU_TYPE.X86_64),
    "amd64": (lief.PE.Header.MACHINE_TYPES.AMD64,),
    "aarch64": (lief.ELF.ARCH.AARCH64,),
    "arm64": (lief.MachO.Header.CPU_TYPE.ARM64,),
}


def dotted(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def of_linux(library: lief.ELF.Binary, tag: str) -> list[str]:
    """Problems of a library for `manylinux_2_17_x86_64` and its like."""
    named = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", tag)
    if named is None:
        return [f"tag: got {tag}, wanted manylinux_X_Y_PROCESSOR"]
    newest = (int(named[1]), int(named[2]))
    found = []
    for needed in library.symbols_version_requirement:
        for version in needed.get_auxiliary_symbols():
            number = re.fullmatch(r"GLIBC_([\d.]+)", version.name)
            if number is None or dotted(number[1]) > newest:
                found.append(f"{needed.name}: got {version.name}, wanted at most that of {tag}")
    return found + [f"needs {name}" for name in library.libraries if GLIBC.fullmatch(name) is None]


def of_macos(library: lief.MachO.Binary, tag: str) -> list[str]:
    """Problems of a library for `macosx_11_0_arm64` and its like."""
    named = re.fullmatch(r"macosx_(\d+)_(\d+)_(arm64|x86_64)", tag)
    if named is None:
        return [f"tag: got {tag}, wanted macosx_X_Y_PROCESSOR"]
    found = []
    oldest = library.build_version.minos[:2] if library.has_build_version else None
    if oldest != [int(named[1]), int(named[2])]:
        found.append(f"oldest macOS: got {oldest}, wanted that of {tag}")
    if named[3] == "arm64" and not library.has_code_signature:  # zig signs for ARM alone, and only there macOS wants it
        found.append("no signature, without which macOS loads nothing on ARM")
    own, *loaded = (each.name for each in library.libraries)
    if own != "@rpath/libeasydel_ragged.dylib":
        found.append(f"its own name: got {own}, wanted no path of the machine that built it")
    return found + [f"needs {name}" for name in loaded if MACOS.fullmatch(name) is None]


def of_windows(library: lief.PE.Binary, tag: str) -> list[str]:
    """Problems of a library for `win_amd64`."""
    found = [] if tag == "win_amd64" else [f"tag: got {tag}, wanted win_amd64"]
    return found + [f"needs {each.name}" for each in library.imports if WINDOWS.fullmatch(each.name) is None]


def problems(wheel: Path) -> list[str]:
    """What is wrong with a wheel; nothing where all is well."""
    tag = wheel.stem.split("-")[-1]
    found = []
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        binaries = [name for name in archive.namelist() if re.search(r"\.(so|dylib|dll|pyd|a|lib|exe)\b", name)]
        suffix = next((known for start, known in SUFFIXES.items() if tag.startswith(start)), "of no known system")
        if binaries != [f"easydel_ragged_plugin/lib/libeasydel_ragged.{suffix}"]:
            return [f"libraries: got {binaries}, wanted one with the suffix {suffix}"]
        (described,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        said = archive.read(described).decode().splitlines()
        if not {"Root-Is-Purelib: false", f"Tag: py3-none-{tag}"} <= set(said):
            found.append(f"WHEEL: got {said}, wanted py3-none-{tag} and no pure library")
        library = lief.parse(archive.extract(binaries[0], folder))
    if isinstance(library, lief.ELF.Binary):
        found += of_linux(library, tag)
        processor: object = library.header.machine_type
        names = {symbol.name for symbol in library.exported_symbols}
    elif isinstance(library, lief.MachO.Binary):
        found += of_macos(library, tag)
        processor = library.header.cpu_type
        names = {symbol.name for symbol in library.exported_symbols} - OF_ZIG
    elif isinstance(library, lief.PE.Binary):
        found += of_windows(library, tag)
        processor = library.header.machine
        names = {function.name for function in library.exported_functions}
    else:
        return [f"a library: got {type(library).__name__}"]
    if processor not in next(known for name, known in PROCESSORS.items() if tag.endswith(name)):
        found.append(f"processor: got {processor}, wanted that of {tag}")
    if len(names) < 8 or any(OURS.fullmatch(name) is None for name in names):
        found.append(f"names: got {sorted(names)}, wanted those of easydel_ragged alone")
    return found


def main(*wheels: str) -> int:
    """Print what is wrong; 0 where nothing is."""
    lief.logging.disable()  # it complains about what zig's linker leaves out
    found = {wheel: problems(Path(wheel)) for wheel in wheels}
    for wheel, wrong in found.items():
        print(f"{Path(wheel).name}: {'; '.join(wrong) or 'holds what its name says'}")
    return 1 if any(found.values()) or not found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
