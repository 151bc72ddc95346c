"""What the driver reads of a launch."""

from __future__ import annotations

import ctypes

from sbnet_cupy import _launch


class Config(ctypes.Structure):
    """CUlaunchConfig, as cuda.h declares it."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, with the only kind of value that is used."""

    _fields_ = (
        ("name", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


def test_a_launch_is_laid_out_as_the_driver_reads_it() -> None:
    frame = _launch._Frame()
    frame.set_launch((1, 2, 3), (4, 5, 6), 7, 2**63 + 8, 2)
    config = Config.from_address(frame.launch_address)
    assert frame.launch_address % 8 == 0
    assert (list(config.grid), list(config.block)) == ([1, 2, 3], [4, 5, 6])
    assert (config.shared, config.stream, config.count) == (7, 2**63 + 8, 2)
    attributes = (Attribute * 2).from_address(config.attributes)
    assert [(a.name, a.value) for a in attributes] == [(6, 1), (2, 1)]


def test_arguments_lie_where_the_driver_looks_for_them() -> None:
    frame = _launch._Frame()
    frame.arguments[:3] = b"abc"
    frame.arguments[frame.room : frame.room + 2] = b"de"
    pointers = (ctypes.c_void_p * 2).from_address(frame.address)
    assert ctypes.string_at(pointers[0], 3) == b"abc"
    assert ctypes.string_at(pointers[1], 2) == b"de"
