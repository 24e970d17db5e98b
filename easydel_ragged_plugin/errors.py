"""The failures that this package names.

Three kinds exist, and only the first two are raised by this package on purpose:

* ``ValueError``: the caller is wrong (a shape, a dtype, a name). The text says what was got, what was
  wanted and what to do next.
* :class:`Unsupported`: the call is meaningful, but the kernel that was asked for can't do it.
* anything else is a defect or the runtime's own failure, and propagates.
"""

from __future__ import annotations

__all__ = ["Unsupported"]


class Unsupported(NotImplementedError):
    """A well-formed request that the named kernel, or every kernel, refuses.

    The message starts with the kernel's name and states the feature that it lacks, for example
    ``xla: page_size 0``. When no kernel is left, it lists each one with its reason.
    """
