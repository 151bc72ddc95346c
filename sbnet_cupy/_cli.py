"""The ``sbnet-cupy`` command: arguments in, one clear line out where something is wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__, _demo, _demo_figure, _demo_network, _demo_picture, _info
from ._demo_errors import DemoError, MissingDependency, brief

_DESCRIPTION = """\
Run a chain of residual bottlenecks on the interesting blocks of a photograph, and skip the rest.

A pixel is interesting if its brightness is far from the picture's median; a block is active if any of its pixels is,
or a pixel so near that it depends on the block. The network finds contours: a 3x3 convolution and three bottlenecks,
all sparse. The result is compared with the dense network, both are timed, and a PNG shows picture, active blocks, the
features of both networks and their difference. Runs on the GPU if there is one, else on NumPy.
"""

_EPILOG = """\
Exit status: 0 if the results agree, 1 if they differ or something is missing, 2 for a bad argument.
"""


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; `arguments` are those of the process by default. Returns the exit status."""
    parser = _build_parser()
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(_info.report())
        return 0
    try:
        _check_output(options.output, options.image)
        outcome = _run_demo(options)
    except MissingDependency as error:
        return _fail(parser, str(error))
    except DemoError as error:
        parser.error(str(error))
    except MemoryError as error:  # CuPy's own kind included
        return _fail(parser, f"not enough memory for this picture: {brief(error)}")
    if outcome.differing_pixels:
        return _fail(parser, "the sparse result differs from the dense one")
    return 0


def _run_demo(options: argparse.Namespace) -> _demo.Outcome:
    name, picture = _demo_picture.load_picture(options.image)
    _demo_figure.require_matplotlib()
    xp, backend = _demo.choose_backend()
    print(f"sbnet-cupy {__version__} on {backend}")
    outcome = _demo.run(picture, options.bsize, options.tol, xp)
    print(_summary(name, outcome, options.tol))
    try:
        _demo_figure.draw(outcome, options.output)
    except OSError as error:
        raise DemoError(_unwritable(options.output, error)) from error
    print(f"wrote     {options.output}")
    return outcome


def _summary(name: str, outcome: _demo.Outcome, tol: float) -> str:
    height, width = outcome.mask.shape
    pixels, blocks, convolved = height * width, outcome.active.size, outcome.convolved_pixels
    sparse, dense = outcome.clock.sparse_seconds, outcome.clock.dense_seconds
    rows, columns = outcome.tile
    chain = f"{_demo_network.BOTTLENECKS} bottlenecks of {_demo_network.CHANNELS}/{_demo_network.DIRECTIONS} channels"
    return "\n".join(
        [
            f"picture   {name}, {width} x {height} pixels",
            f"mask      {outcome.mask.mean():.1%} of pixels: brightness more than {tol:g} from the median",
            f"blocks    {outcome.active_blocks} of {blocks} active, {columns} x {rows} pixels each: "
            f"{1 - outcome.active_blocks / blocks:.1%} skipped",
            f"network   a 3x3 convolution and {chain}, float32",
            f"pixels    {convolved} convolved by each layer, halos included, of {pixels}: {convolved / pixels:.1%}",
            f"sparse    {1e3 * sparse:.3f} ms: mask reduction, convolution, bottlenecks",
            f"dense     {1e3 * dense:.3f} ms: convolution, bottlenecks: {dense / sparse:.2f} times as long",
            f"          ({outcome.clock.method}; the mask is made beforehand)",
            f"check     {_verdict(outcome)}",
        ]
    )


def _verdict(outcome: _demo.Outcome) -> str:
    pixels, certain = outcome.mask.size, int(outcome.certain.sum())
    if outcome.differing_pixels:
        return (
            f"MISMATCH: {outcome.differing_pixels} of {pixels} pixels differ from what the dense network computes, "
            f"by up to {outcome.largest_difference:g} of {outcome.dense.max():g}"
        )
    return (
        f"exactly equal to the dense network on {certain} pixels, all {outcome.mask.sum()} masked ones among them,\n"
        f"          and on all {pixels} to a dense network that drops inactive blocks after each layer"
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sbnet-cupy",
        usage="sbnet-cupy [--image PATH] [--bsize N] [--tol T] [--output PATH]\n       sbnet-cupy info",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sbnet-cupy {__version__}")
    parser.add_argument(
        "--image",
        type=Path,
        metavar="PATH",
        help=f"picture to work on (default: {_demo_picture.DEFAULT_IMAGE}, which scikit-image brings)",
    )
    parser.add_argument(
        "--bsize",
        type=_positive,
        default=_demo.DEFAULT_BSIZE,
        metavar="N",
        help="height and width of a block in pixels, without its halo (default: %(default)s)",
    )
    parser.add_argument(
        "--tol",
        type=_fraction,
        default=_demo.DEFAULT_TOL,
        metavar="T",
        help="how far a pixel's brightness, (R + 2 G + B) / 4, must be from the picture's median to make its "
        "block active: a fraction of full brightness, 0 to 1 (default: %(default)s); smaller is more blocks",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("sbnet-cupy.png"),
        metavar="PATH",
        help="PNG file to write (default: %(default)s)",
    )
    report = "print versions, device, kernels and caches, for a bug report"
    commands = parser.add_subparsers(
        dest="command", metavar="info", prog=parser.prog, title="other commands", help=report
    )
    commands.add_parser("info", description=report.capitalize() + ".")
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return value


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:  # NaN included
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def _check_output(path: Path, image: Path | None) -> None:
    """Raise before the work, not after it, where the picture cannot be written."""
    if os.path.isdir(path):
        raise DemoError(f"--output: expected a file to write, got the directory {str(path)!r}")
    exists = os.path.exists(path)
    if exists and image is not None and os.path.exists(image) and path.samefile(image):
        raise DemoError(f"--output: expected another file than --image, got {str(path)!r}")
    if not os.path.isdir(path.parent):
        raise DemoError(f"--output: expected a file in an existing directory, got {str(path)!r}")
    if not os.access(path if exists else path.parent, os.W_OK):
        raise DemoError(_unwritable(path, PermissionError("permission denied")))


def _unwritable(path: Path, error: OSError) -> str:
    return f"--output: expected a file that can be written, got {str(path)!r}: {error.strerror or error}"


def _fail(parser: argparse.ArgumentParser, message: str) -> int:
    print(f"{parser.prog}: error: {message}", file=sys.stderr)
    return 1
