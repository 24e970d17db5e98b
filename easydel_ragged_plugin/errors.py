"""The errors of this package.

There are three kinds. This package raises only the first two on purpose:

* ``ValueError``: an argument is wrong (a shape, a dtype, a name). The text gives what was got, what was
  wanted and what to do next.
* :class:`Unsupported`: the call is valid, but the named kernel, or every kernel, can't run it.
* Any other exception is a defect or a failure of the runtime. It propagates.
"""

from __future__ import annotations

__all__ = ["Unsupported"]


class Unsupported(NotImplementedError):
    """A valid request that the named kernel, or every kernel, refuses.

    The message starts with the kernel's name and has its reason, for example ``xla: takes no TurboQuant cache``. When
    every kernel refuses, it lists each one with its reason.
    """
