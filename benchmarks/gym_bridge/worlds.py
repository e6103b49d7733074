"""Other people's simulators, imported without the packages that they name but do not need here.

RecoGym and RecSim date from the days of `gym`, TensorFlow 1 and gin. What is wanted of them needs numpy (and numba)
only: while they are imported, hollow modules stand in for the rest, and are gone afterwards.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numba  # noqa: F401 (RecoGym's: to be there before something hollow takes SciPy's name)


class WorldMissing(ImportError):
    """A simulator is not installed, or another version of it; the message says how to install it."""


@cache
def recogym() -> ModuleType:
    """RecoGym's module of the environment "reco-gym-v1" (Rohde et al. 2018). Raises: WorldMissing."""
    package = _hollow_package("recogym", "0.1.3.0")
    stand_ins = {
        **_gym(),
        "recogym": package,
        "recogym.agents": _module("recogym.agents", Agent=object),
        "pandas": _module("pandas"),
        "scipy": _module("scipy"),
        "scipy.special": _module("scipy.special", expit=None),
        "tqdm": _module("tqdm", trange=range),
    }
    with _standing_in(stand_ins):
        module = importlib.import_module("recogym.envs.reco_env_v1")
    if hasattr(module.ff, "py_func"):
        # numba looks for a compiled version anew at each call that leaves arguments out
        compiled, defaults = module.ff, module.ff.py_func.__defaults__
        vars(module)["ff"] = lambda scores: compiled(scores, *defaults)
    return module


@cache
def recsim() -> ModuleType:
    """RecSim's module of the environment "interest evolution" (Ie et al. 2019). Raises: WorldMissing."""
    package = _hollow_package("recsim", "0.2.4")
    gin = _module("gin", configurable=lambda thing: thing)
    stand_ins = {
        **_gym(),
        "recsim": package,
        "recsim.simulator": _hollow_part(package, "simulator"),
        "recsim.environments": _hollow_part(package, "environments"),
        "gin": gin,
        "gin.tf": _module("gin.tf"),
        "absl": _module("absl"),
        "absl.flags": _module("absl.flags", FLAGS=None),
        "absl.logging": _module("absl.logging", debug=lambda *_: None),
        "six": _module("six", add_metaclass=_add_metaclass),
    }
    with _standing_in(stand_ins):
        return importlib.import_module("recsim.environments.interest_evolution")


def _hollow_package(name: str, version: str) -> ModuleType:
    """The package without what its `__init__` would import; its submodules are found all the same."""
    spec = importlib.util.find_spec(name)
    locations = None if spec is None else spec.submodule_search_locations
    found = importlib.metadata.version(name) if locations else "none"
    if found != version:
        raise WorldMissing(
            f"this world needs {name} {version}, installed is {found}: `pip install --no-deps {name}=={version}` "
            "(--no-deps: it names a whole TensorFlow as a requirement, of which nothing is used here)"
        )
    return _module(name, __path__=list(locations or []), __spec__=spec)


def _hollow_part(package: ModuleType, name: str) -> ModuleType:
    """A package within it, hollow too."""
    return _module(f"{package.__name__}.{name}", __path__=[str(Path(at, name)) for at in package.__path__])


def _gym() -> dict[str, ModuleType]:
    """As much of gym as a class statement and a declaration of spaces need."""
    kinds = ("Box", "Dict", "Discrete", "MultiDiscrete", "Tuple")
    spaces = _module("gym.spaces", **{kind: type(kind, (_Space,), {}) for kind in kinds})
    return {"gym": _module("gym", Env=type("Env", (), {}), spaces=spaces), "gym.spaces": spaces}


class _Space:
    def __init__(self, *about: Any, **more: Any) -> None:
        self.about = about, more


def _add_metaclass(metaclass: type) -> Any:
    """six's decorator."""
    return lambda plain: metaclass(plain.__name__, plain.__bases__, _own(vars(plain)))


def _own(names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in names.items() if name not in ("__dict__", "__weakref__")}


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


@contextmanager
def _standing_in(stand_ins: Mapping[str, ModuleType]) -> Iterator[None]:
    """These modules under their names, in place of whatever is there, until the end of the block."""
    before = {name: sys.modules.get(name) for name in stand_ins}
    for name, module in stand_ins.items():
        if "." in name and (parent := stand_ins.get(name.rpartition(".")[0])) is not None:
            setattr(parent, name.rpartition(".")[2], module)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, was in before.items():
            if was is not None:
                sys.modules[name] = was
            else:
                sys.modules.pop(name, None)
