"""Where the CUDA sources lie, and what they say."""

from __future__ import annotations

import functools
from pathlib import Path

#: The file by which the folder is known.
_SENTINEL = "gather.cu"


@functools.cache
def kernel_folder() -> Path:
    """Return the folder of the ``.cu`` and ``.cuh`` files.

    It lies in the package once installed, and beside the package in a checkout or an editable install.

    Returns
    -------
    Path
        The absolute path.

    Raises
    ------
    RuntimeError
        The folder is in neither place.
    """
    package = Path(__file__).resolve().parent
    places = (package / "kernels", package.parent / "kernels")
    for place in places:
        if (place / _SENTINEL).is_file():
            return place
    raise RuntimeError(
        f"kernel sources: expected {_SENTINEL} in {places[0]} or in {places[1]}, got neither; install sbnet-cupy again"
    )


@functools.cache
def sources_digest() -> str:
    """Return a digest of the names and bytes of all CUDA sources.

    It goes into every compiled text, since CuPy's own cache key does not see the headers: so an edited
    header never meets a stale binary.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    import hashlib  # which would lengthen the package's import by a twentieth

    digest = hashlib.sha256()
    folder = kernel_folder()
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.cuh")]):
        text = path.read_bytes()
        digest.update(f"{path.name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()[:16]
