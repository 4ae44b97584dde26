"""Named things of one kind (attacks, judges, claims), each declared in one file.

A module of the registry's package declares its things when it is imported, by ``REGISTRY.add(...)``
at the beginning of a line; such modules are imported when something is first looked up. A plugin,
which is any other Python file, declares its things in the same way (``load_plugin``).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from core.errors import AttackPlaneError, nearest
from core.records import content_hash

DECLARES = re.compile(r"^(\w+ = )?[A-Z_]+\.add\(", re.MULTILINE)


class Named(Protocol):
    @property
    def name(self) -> str: ...


Item = TypeVar("Item", bound=Named)


class Registry(Generic[Item]):
    """Things by name.

    Args:
        what: the kind, for messages.
        package: whose modules declare them.
    """

    def __init__(self, what: str, package: str) -> None:
        self.what, self.package = what, package
        self._items: dict[str, Item] = {}
        self._complete = False

    def add(self, item: Item) -> Item:
        """Declare one.

        Raises:
            AttackPlaneError: the name is taken by another one.
        """
        before = self._items.get(item.name)
        if before is not None and before != item:
            raise AttackPlaneError(
                f"two {self.what}s have one name",
                got=item.name,
                remedy="give the new one another name",
            )
        self._items[item.name] = item
        return item

    def remove(self, name: str) -> None:
        """Forget one, such as a plugin's after its test."""
        self._items.pop(name, None)

    def all(self) -> dict[str, Item]:
        """Everything declared, by name."""
        if not self._complete:
            self._complete = True  # a module that is imported here may ask for the others
            try:
                for module in self._declaring():
                    importlib.import_module(module)
            except BaseException:
                self._complete = False
                raise
        return dict(self._items)

    def _declaring(self) -> list[str]:
        """The package's modules that declare something; the others may be slow to import."""
        folder = Path(importlib.import_module(self.package).__path__[0])
        return [
            f"{self.package}.{file.stem}"
            for file in sorted(folder.glob("*.py"))
            if DECLARES.search(file.read_text(encoding="utf-8"))
        ]

    def get(self, name: str) -> Item:
        """One by its name.

        Raises:
            AttackPlaneError: no such name; the nearest known one is named.
        """
        if name in self._items:
            return self._items[name]
        own = f"{self.package}.{name}"  # usually its module has its name
        if name.isidentifier() and importlib.util.find_spec(own):
            importlib.import_module(own)
        items = self._items if name in self._items else self.all()
        if name not in items:
            raise AttackPlaneError(
                f"unknown {self.what} {name!r}", remedy=nearest(name, sorted(items))
            )
        return items[name]


def load_plugin(path: Path) -> None:
    """Run a Python file that declares attacks, judges or claims.

    A file that has been run is not run again.

    Raises:
        AttackPlaneError: no such file, or it cannot be run.
    """
    name = f"attack_plane_plugin_{content_hash(str(path.resolve()), 8)}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise AttackPlaneError("no such plugin", where=path, remedy="give a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a plugin raises is the plugin's fault
        del sys.modules[name]
        raise AttackPlaneError(
            "the plugin cannot be loaded", where=path, got=f"{type(error).__name__}: {error}"
        ) from error
