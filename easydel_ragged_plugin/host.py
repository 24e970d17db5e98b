"""EasyDeL's versions, and where each keeps its parts. No other file has import paths of the host.

Importing this module imports nothing but ``sys``: ``startup.py`` reads :data:`OPERATIONS_PACKAGES` while the host is
being imported. Everything else is imported inside functions, when it is needed.
"""

import sys

TYPE_CHECKING = False  # what type checkers take for typing.TYPE_CHECKING
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

__all__ = [
    "OPERATIONS_PACKAGES",
    "OPERATION_NAMES",
    "PACKAGES",
    "SUPPORTED",
    "host_version",
    "streams_whole_answers",
    "load",
    "loaded_operations",
    "operations_module",
    "registry",
]

OPERATIONS_PACKAGES = ("easydel.operations", "easydel.layers.operations")
"""The host's operations package, newest name first. Built-in operations are registered when it has been executed."""

OPERATION_NAMES = ("ragged_page_attention_v2", "ragged_page_attention_v3")
"""The ``attn_mechanism`` names that this package serves."""

SUPPORTED = ("0.2.0.2", "0.3.0")
"""Host versions that the tests cover in full."""

PACKAGES = ("easydel", "pillow", "torch")
"""What to install for the host, by names for pip: it imports the last two and does not declare them."""

PASSED_ARGUMENTS = frozenset(
    (
        "mask_info",
        "bias",
        "init_bias",
        "causal",
        "deterministic",
        "dropout_rng",
        "dropout_prob",
        "precision",
        "prevent_cse",
        "cum_seqlens_q",
        "cum_seqlens_k",
        "normalize_output",
        "fused_backward",
        "policy",
        "mode",
    )
)
"""Arguments that the host's attention layer hands to every operation and that paged attention has no use for.

Masks follow from the metadata, serving has no dropout and no backward pass. The operations accept these
names and no others; see ``operations.py`` for the values that they still refuse.
"""


def _first_importable(names: tuple[str, ...]) -> "ModuleType":
    import importlib
    import importlib.util

    for name in names:
        if name in sys.modules:
            return sys.modules[name]
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # a parent package does not exist
            found = None
        if found is not None:
            return importlib.import_module(name)
    raise ModuleNotFoundError(
        f"none of {', '.join(names)} can be imported: EasyDeL is not installed in this environment, or its version is "
        f"not one of {', '.join(SUPPORTED)}. Run: pip install {' '.join(PACKAGES)}",
        name=names[0],
    )


def host_version() -> str | None:
    """Version of the installed EasyDeL distribution, or None when there is none."""
    from importlib import metadata

    try:
        return metadata.version("easydel")
    except metadata.PackageNotFoundError:
        return None


def streams_whole_answers() -> bool:
    """Whether the installed EasyDeL's server streams a chat in full; True where no EasyDeL is installed.

    0.2.0.2 sends the newest part of an answer each time, also where there have been several since the last time.
    """
    import re

    numbers = re.match(r"(\d+)\.(\d+)", host_version() or "")
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= (0, 3)


def operations_module() -> "ModuleType":
    """The host's operations package, imported when it has not been."""
    return _first_importable(OPERATIONS_PACKAGES)


def loaded_operations() -> "ModuleType | None":
    """The host's operations package if it is in ``sys.modules``, perhaps half imported. Imports nothing."""
    for name in OPERATIONS_PACKAGES:
        if sys.modules.get(name) is not None:
            return sys.modules[name]
    return None


def registry(operations: "ModuleType | None" = None) -> dict[str, type]:
    """The host's operation classes by name: the dict that the host itself reads, so a change to it counts.

    Args:
        operations: the host's operations package; None imports it.

    Raises:
        ModuleNotFoundError: no supported EasyDeL is installed.
        TypeError: the package has no such dict, or no base class of operations.
    """
    if operations is None:
        operations = operations_module()
    found = getattr(getattr(operations, "OperationRegistry", None), "_registry", None)
    if not isinstance(found, dict) or not isinstance(getattr(operations, "OperationImpl", None), type):
        raise TypeError(
            f"{operations.__name__} has no OperationRegistry._registry (dict) and OperationImpl (class): this EasyDeL "
            "is not supported yet; upgrade easydel-ragged-plugin, or set EASYDEL_RAGGED_PLUGIN=0"
        )
    return found


def load() -> "Any":
    """The host's classes that the operations and the contract kit need, as attributes of one namespace.

    Raises:
        ModuleNotFoundError: no supported EasyDeL is installed.
    """
    import importlib
    from types import SimpleNamespace

    operations = operations_module()
    requirements = importlib.import_module(f"{operations.__name__}.requirements")
    caching = _first_importable(("easydel.caching", "easydel.layers.caching"))
    try:
        turboquant = importlib.import_module("easydel.caching.turboquant_ragged_page").TurboQuantRaggedPagesCacheView
    except ModuleNotFoundError:  # 0.2.0.2 has none
        turboquant = None
    try:
        data_parallel_axis = importlib.import_module("easydel.axis").ATTN_DP
    except ModuleNotFoundError:  # 0.2.0.2 replicates pages
        data_parallel_axis = None
    helpers = importlib.import_module("easydel.utils.helpers")
    return SimpleNamespace(
        version=host_version(),
        OperationImpl=operations.OperationImpl,
        OperationRegistry=operations.OperationRegistry,
        OperationMetadata=operations.OperationMetadata,
        AttentionOutput=operations.AttentionOutput,
        RequirementsBuilder=requirements.RequirementsBuilder,
        CacheType=requirements.CacheType,
        MetadataField=requirements.MetadataField,
        ExecutionMode=requirements.ExecutionMode,
        RaggedPagesCacheView=caching.RaggedPagesCacheView,
        RaggedPagesCacheConfig=caching.RaggedPagesCacheConfig,
        RaggedPagesMetadata=caching.RaggedPagesMetadata,
        TurboQuantRaggedPagesCacheView=turboquant,
        data_parallel_axis=data_parallel_axis,
        native_runtime_forced=lambda: helpers.check_bool_flag("FORCE_NATIVE_RUNTIME", False),
        # 0.2.0.2's attention layer casts every leaf of an operation's output, pages included, to its own dtype.
        casts_returned_pages=operations.__name__ == "easydel.layers.operations",
        axes=importlib.import_module("eformer.common_types"),
    )
