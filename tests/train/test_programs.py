"""Compiled programs on disk: where, how many, and what becomes of damaged ones."""

import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import runs
from jax.experimental.compilation_cache import compilation_cache

from jdecouple.train import cli, programs

KEYS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where programs are to be kept, by a JAX that has been told nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    before = {key: getattr(jax.config, key) for key in KEYS}
    jax.config.update(KEYS[0], None)
    compilation_cache.reset_cache()
    with warnings.catch_warnings():
        yield tmp_path / "jdecouple" / "xla"
    for key, value in before.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(programs.logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def compiled(number: float) -> float:
    """Compiles a program, whatever this process has compiled before."""
    jax.clear_caches()

    @jax.jit
    def a_program_of_its_own(x):
        return x * number

    return float(a_program_of_its_own(jnp.ones(())))


def entries(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*a_program_of_its_own*-cache")}


def test_the_folder_is_in_the_cache_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(programs.sys, "platform", "linux")
    assert programs.cache_folder({}) == Path("/home/me/.cache/jdecouple/xla")
    assert programs.cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/jdecouple/xla")
    monkeypatch.setattr(programs.sys, "platform", "darwin")
    assert programs.cache_folder({}) == Path("/home/me/Library/Caches/jdecouple/xla")


def test_a_program_is_kept_however_small(folder, told):
    programs.keep()
    assert compiled(2.0) == 2
    assert len(entries(folder)) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    assert told == []


@pytest.mark.parametrize("key", ["jax_compilation_cache_dir", "jax_enable_compilation_cache"])
def test_what_jax_was_told_holds(folder, tmp_path, key):
    before = getattr(jax.config, key)
    jax.config.update(key, str(tmp_path / "own") if key.endswith("dir") else False)
    try:
        programs.keep()
        assert jax.config.jax_compilation_cache_dir != str(folder)
        assert not folder.exists()
    finally:
        jax.config.update(key, before)


@pytest.mark.parametrize("damage", [b"", b"no program"])
def test_a_damaged_program_is_replaced_in_silence(folder, damage):
    shown = []
    warnings.showwarning = lambda *args: shown.append(args)
    programs.keep()
    assert compiled(3.0) == 3
    ((name, whole),) = entries(folder).items()
    for _ in range(2):
        (folder / name).write_bytes(damage)
        assert compiled(3.0) == 3
        assert entries(folder).keys() == {name}
        assert len(entries(folder)[name]) > len(whole) / 2
    assert shown == []


def test_other_warnings_are_shown(folder):
    shown = []
    warnings.showwarning = lambda message, *args: shown.append(str(message))
    programs._drop_damaged(folder)
    warnings.warn("something else", stacklevel=1)
    assert shown == ["something else"]


@pytest.mark.parametrize("home", ["a file", "read-only", "none", "no UTF-8"])
def test_a_folder_that_cannot_be_used_is_one_warning(folder, told, tmp_path, monkeypatch, home):
    if home == "a file":
        (tmp_path / "jdecouple").touch()
    elif home == "read-only":
        folder.mkdir(parents=True)
        monkeypatch.setattr(programs.os, "access", lambda *_: False)  # root may write anywhere
    elif home == "none":
        monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    programs.keep()
    assert jax.config.jax_compilation_cache_dir is None
    assert len(told) == 1
    assert told[0].startswith("compiled programs are not kept")


def test_what_was_used_least_recently_goes_first(tmp_path):
    for number, name in enumerate(["b-cache", "a-cache", "c-cache"]):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (number, number))
    (tmp_path / "other").write_bytes(b"x" * 100)
    programs.prune(tmp_path, 20)
    assert sorted(os.listdir(tmp_path)) == ["a-cache", "c-cache", "other"]
    programs.prune(tmp_path, 20)
    assert sorted(os.listdir(tmp_path)) == ["a-cache", "c-cache", "other"]
    programs.prune(tmp_path, 0)
    assert os.listdir(tmp_path) == ["other"]


@pytest.mark.parametrize("flag", [[], ["--nocache"], ["--cache=false"]])
def test_a_flag_turns_it_off(monkeypatch, tmp_path, flag):
    kept = []
    monkeypatch.setattr(cli, "log_in_short", lambda: None)
    monkeypatch.setattr(programs, "keep", lambda: kept.append(True))
    monkeypatch.setattr(cli.loop, "train_and_evaluate", lambda *_: None)
    cli.main(["train.py", *runs.arguments(tmp_path), *flag])
    assert kept == [True] * (not flag)
