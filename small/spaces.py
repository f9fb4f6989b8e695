"""Spaces to walk in: cells, and actions that lead from one to another. Squares, lines, cubes, hexagons, a tree, a file.

Kim et al. 2023, Section 2.1, has squares of 11 x 11; its Appendix A.1.2 has the place cell score for "various graph
structures, such as 2D hexagonal grids or 3D grid spaces", and a space here is any of those. A file may be

    .txt      a maze: every character but a space and # is a cell, # and spaces are walls; four directions
    .json     {"edges": [[from, to] or [from, to, action], ...], "places": {cell: [x, y(, z)]}}
    .graphml, .gml, .adjlist, .edgelist    what networkx reads; cells may have `x`, `y`, `z`, directed edges an `action`

Text is UTF-8. Names in .adjlist and .edgelist end at a space, or at a tab in a file that has tabs: then they may have
spaces. An edge with an action leads one way; one without, or whose action is null, leads both. Where no action is
named, cells with places have the displacement as the action, and cells without have their exits numbered in the order
of the file, which says nothing of a direction: what can be learned there is where an exit leads, not how exits add up.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from llm.common.errors import UserError

STAY = "stay"
NOWHERE = -1
WALLS = frozenset("# ")
DECIMALS = 6  # of a displacement: those that differ by less are one action


@dataclass(frozen=True)
class Graph:
    """A space of S cells and A actions, the first of which is to stay.

    Args:
        cells: names.
        actions: names.
        targets: (S, A), the cell that an action leads to, -1 where it cannot be taken.
        places: (S, 2 or 3), where cells are drawn; None where nothing says so.

    Raises:
        UserError: no cell; a cell without exits; a cell that cannot be reached, or left, from the first. The cell is
            named.
    """

    cells: tuple[str, ...]
    actions: tuple[str, ...]
    targets: np.ndarray = field(repr=False)
    places: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.cells:
            raise UserError("a space needs cells, and it has none")
        exits = (self.targets[:, 1:] != NOWHERE).any(1)
        if len(self.cells) < 2 or not exits.all():
            lonely = self.cells[int(exits.argmin())]
            raise UserError(f"cell {lonely} has no exits: connect it to another cell, or take it out")
        first = self.cells[0]
        for way, graph in (("reached from", self.directed), ("left for", self.directed.reverse(copy=False))):
            missed = set(graph) - nx.descendants(graph, 0) - {0}
            if missed:
                cell = self.cells[min(missed)]
                raise UserError(f"cell {cell} cannot be {way} cell {first}: connect the two parts, or take one out")

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns of a space that is a whole square in row-major order; None of any other."""
        if self.places is None or self.places.shape[1] != 2:
            return None
        columns = int(self.places[:, 0].max()) + 1
        rows = len(self.cells) // columns
        square = [(column, row) for row in range(rows) for column in range(columns)]
        return (rows, columns) if min(rows, columns) > 1 and np.array_equal(self.places, square) else None

    @property
    def name(self) -> str:
        """How many cells and actions it has, in words."""
        return f"{len(self.cells)} cells, {len(self.actions)} actions"

    @cached_property
    def directed(self) -> nx.DiGraph:
        """Cells by number, an edge where an action leads, without staying."""
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.cells)))
        rows, columns = np.nonzero(self.targets[:, 1:] != NOWHERE)
        graph.add_edges_from(zip(rows.tolist(), self.targets[rows, columns + 1].tolist(), strict=True))
        return graph

    @cached_property
    def adjacency(self) -> np.ndarray:
        """(S, S) bool: whether an action leads from one cell to the other or back; no cell is its own neighbour."""
        there = nx.to_numpy_array(self.directed, nodelist=range(len(self.cells)), weight=None) > 0
        return (there | there.T) & ~np.eye(len(there), dtype=bool)

    @cached_property
    def transition(self) -> np.ndarray:
        """(S, S) probabilities of a step: every action that can be taken is as likely, D^-1 (A + I) on a grid."""
        counts = np.zeros((len(self.cells),) * 2)
        rows, columns = np.nonzero(self.targets != NOWHERE)
        np.add.at(counts, (rows, self.targets[rows, columns]), 1)
        return counts / counts.sum(1, keepdims=True)

    def record(self) -> dict[str, Any]:
        """Return all of it in terms of JSON, for `from_record`."""
        places = None if self.places is None else self.places.tolist()
        return {"cells": self.cells, "actions": self.actions, "targets": self.targets.tolist(), "places": places}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Graph":
        """The graph of `record()`."""
        places = None if record["places"] is None else np.array(record["places"], float)
        return cls(tuple(record["cells"]), tuple(record["actions"]), np.array(record["targets"], np.int64), places)


# ---- Regular spaces --------------------------------------------------------------------------------------------------

Steps = dict[str, tuple[int, ...]]  # action -> displacement
SQUARE: Steps = {"right": (0, 1), "down": (1, 0), "up": (-1, 0), "left": (0, -1)}  # +1, +L, -L, -1 in row-major order
HEXAGONAL: Steps = SQUARE | {"up right": (-1, 1), "down left": (1, -1)}  # axial coordinates: six neighbours
LINE: Steps = {"right": (1,), "left": (-1,)}
CUBE: Steps = {
    "right": (0, 0, 1), "down": (0, 1, 0), "below": (1, 0, 0), "above": (-1, 0, 0), "up": (0, -1, 0), "left": (0, 0, -1)
}  # fmt: skip


def lattice(shape: Sequence[int], steps: Steps, place: Callable | None = None) -> Graph:
    """The cells of a box in row-major order, with actions that add a step, where that stays within the box.

    Args:
        shape: cells along each dimension.
        steps: action -> displacement.
        place: coordinates -> where to draw; None is (column, row), and depth where there is one.
    """
    if min(shape) < 1:
        raise UserError(f"a space of {'x'.join(map(str, shape))} has no cells: give each side at least 1")
    coordinates = list(itertools.product(*map(range, shape)))
    number = {at: index for index, at in enumerate(coordinates)}
    targets = [
        [index, *(number.get(tuple(a + b for a, b in zip(at, step, strict=True)), NOWHERE) for step in steps.values())]
        for at, index in number.items()
    ]
    places = [place(at) if place else (*reversed(at), 0)[: max(2, len(at))] for at in coordinates]
    names = tuple(",".join(map(str, at)) for at in coordinates)
    return Graph(names, (STAY, *steps), np.array(targets), np.array(places, float))


def _hexagonal_place(at: tuple[int, int]) -> tuple[float, float]:
    row, column = at
    return column + row / 2, row * math.sqrt(3) / 2


def family_tree(generations: int) -> Graph:
    """A full binary tree of people, everyone with a sister or brother; actions are relations.

    As in the example of Whittington et al. 2022, Figure 1, parent, sibling and niece lead back to where they began
    (from a daughter). The first generation has no parent, and the last no children.
    """
    if generations < 2:
        raise UserError(f"a family tree of {generations} has no relations: give at least 2 generations")
    people = [(level, place) for level in range(generations) for place in range(2 ** (level + 1))]
    last = generations - 1

    def related(level: int, place: int) -> Iterable[tuple[str, tuple[int, int]]]:
        sibling, parent = place ^ 1, place // 2
        yield "sibling", (level, sibling)
        if level:
            yield "parent", (level - 1, parent)
            yield "aunt", (level - 1, parent ^ 1)
        if level > 1:
            yield "grandparent", (level - 2, place // 4)
        if level < last:
            yield from (("daughter", (level + 1, 2 * place)), ("son", (level + 1, 2 * place + 1)))
            yield from (("niece", (level + 1, 2 * sibling)), ("nephew", (level + 1, 2 * sibling + 1)))

    edges = [(person, other, relation) for person in people for relation, other in related(*person)]
    spread: dict[Any, tuple[float, ...]] = {
        person: ((person[1] + 0.5) * 2.0 ** (last - person[0]), float(person[0])) for person in people
    }
    return _assembled(people, edges, spread)


def space(text: str) -> Graph:
    """The space that a few characters name: 11x11, line:20, hex:9x9, 4x4x4, family:4, or a file.

    Raises:
        UserError: it is none of these, or cannot be walked.
    """
    if match := re.fullmatch(r"(line:|hex:|family:)?(\d+(?:x\d+)*)", text):
        kind, shape = match[1] or "", tuple(map(int, match[2].split("x")))
        if kind == "hex:" and len(shape) == 2:
            return lattice(shape, HEXAGONAL, _hexagonal_place)
        if kind == "family:" and len(shape) == 1:
            return family_tree(shape[0])
        if kind == "line:" and len(shape) == 1:
            return lattice(shape, LINE)
        if not kind and len(shape) in (2, 3):
            return lattice(shape, SQUARE if len(shape) == 2 else CUBE)
    elif Path(text).is_file():
        return read(Path(text))
    raise UserError(
        f"space {text!r} is unknown: give a square as 11x11, line:20, hex:9x9, a cube as 4x4x4, family:4, or a file "
        "that is there"
    )


# ---- Files -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> Graph:
    """The space of a file, see above.

    Raises:
        UserError: it cannot be read, is of no known kind, or cannot be walked.
    """
    if path.suffix not in _READERS:
        raise UserError(f"{path} is of no known kind: give one of {', '.join(_READERS)}")
    try:
        return _READERS[path.suffix](path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, LookupError, SyntaxError, nx.NetworkXError) as error:
        raise UserError(f"{path} cannot be read as {path.suffix} ({error})") from error


def _lines(path: Path) -> list[str]:
    """The lines of a text file, however they end. (str.splitlines would cut names at rarer characters, too.)"""
    return re.split(r"\r\n|\r|\n", path.read_bytes().decode("utf-8-sig"))


def _maze(path: Path) -> Graph:
    lines = _lines(path)
    if odd := [mark for line in lines for mark in line if mark.isspace() and mark not in WALLS]:
        raise UserError(f"the character {odd[0]!r} is neither a cell nor a wall: draw walls with spaces or #")
    at = [(row, column) for row, line in enumerate(lines) for column, mark in enumerate(line) if mark not in WALLS]
    there = set(at)
    edges = [
        (cell, other, action)
        for cell in at
        for action, step in SQUARE.items()
        if (other := (cell[0] + step[0], cell[1] + step[1])) in there
    ]
    return _assembled(at, edges, {cell: (float(cell[1]), float(cell[0])) for cell in at}, tuple(SQUARE))


def _json(path: Path) -> Graph:
    record = json.loads(path.read_bytes().decode("utf-8-sig"))
    if not isinstance(record, dict) or not isinstance(record.get("edges"), list):
        raise UserError('it has no list of "edges"')
    for edge in record["edges"]:
        if not isinstance(edge, list) or len(edge) not in (2, 3):
            raise UserError(f"edge {edge} is not [from, to] or [from, to, action]")
    edges = [(_name(edge[0], "cell"), _name(edge[1], "cell"), _action([*edge, None][2])) for edge in record["edges"]]
    places = {cell: tuple(map(float, at)) for cell, at in (record.get("places") or {}).items()}
    cells = list(dict.fromkeys([*places, *(cell for edge in edges for cell in edge[:2])]))
    return _assembled(cells, _both_ways(edges), places)


def _name(value: Any, what: str) -> str:
    """The name of a cell or an action as text; UserError where it is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise UserError(f"{value!r} is not the name of {what}: give text or a number")
    return str(value)


def _action(value: Any) -> str | None:
    return None if value is None else _name(value, "an action")


def _graphml(path: Path) -> nx.Graph:
    return nx.read_graphml(path)


def _gml(path: Path) -> nx.Graph:
    text = path.read_bytes().decode("utf-8-sig").encode("ascii", "xmlcharrefreplace").decode()
    graph = nx.parse_gml(text, label="id")
    labels = [facts["label"] for _, facts in graph.nodes(data=True) if "label" in facts]
    if not labels:
        return graph
    if len(set(labels)) < len(graph):
        raise UserError("some cells have no label, or two have the same: give each its own, or none any")
    return nx.relabel_nodes(graph, dict(zip(graph, labels, strict=True)))


def _separated(parse: Callable[..., nx.Graph]) -> Callable[[Path], nx.Graph]:
    """A reader of lines of names, which `parse` reads where one character separates them."""

    def read_it(path: Path) -> nx.Graph:
        lines = _lines(path)
        if within := [line for line in lines if re.search(r"[^\s#]#", line)]:
            raise UserError(f"the line {within[0]!r} has # in a name, where a comment would begin: rename the cell")
        lines = [line.partition("#")[0] for line in lines]
        if any("\t" in line.strip() for line in lines):
            return parse([line.strip("\t") for line in lines if line.strip()], delimiter="\t")
        return parse([re.sub(" +", " ", line.strip(" ")) for line in lines if line.strip()], delimiter=" ")

    return read_it


def _networkx(reader: Callable[[Path], nx.Graph]) -> Callable[[Path], Graph]:
    def read_it(path: Path) -> Graph:
        graph = reader(path)
        places = {
            cell: tuple(float(facts[axis]) for axis in "xyz" if axis in facts)
            for cell, facts in graph.nodes(data=True)
            if {"x", "y"} <= facts.keys()
        }
        edges = [(a, b, _action(facts.get("action"))) for a, b, facts in graph.edges(data=True)]
        if not graph.is_directed():
            if named := [edge for edge in edges if edge[2] is not None]:
                raise UserError(
                    f"the edge from {named[0][0]} to {named[0][1]} has an action and no direction: make the graph "
                    "directed"
                )
            edges = _both_ways(edges)
        return _assembled(list(graph), edges, places)

    return read_it


_READERS: dict[str, Callable[[Path], Graph]] = {
    ".txt": _maze,
    ".json": _json,
    ".graphml": _networkx(_graphml),
    ".gml": _networkx(_gml),
    ".adjlist": _networkx(_separated(nx.parse_adjlist)),
    ".edgelist": _networkx(_separated(nx.parse_edgelist)),
}


def _both_ways(edges: Iterable[tuple[Any, Any, str | None]]) -> list[tuple[Any, Any, str | None]]:
    """An edge without an action leads back too."""
    found = [way for a, b, action in edges for way in ([(a, b, action)] + ([(b, a, None)] if action is None else []))]
    return list(dict.fromkeys(found))


def _assembled(
    cells: Sequence[Hashable],
    edges: Sequence[tuple[Hashable, Hashable, str | None]],
    places: dict[Any, tuple[float, ...]],
    actions: tuple[str, ...] = (),
) -> Graph:
    """Number the cells, and name the actions that have no name."""
    if missing := [cell for cell in cells if places and cell not in places]:
        raise UserError(f"cell {missing[0]} has no place, and others have: give all or none")
    if len({len(at) for at in places.values()}) > 1 or any(len(at) not in (2, 3) for at in places.values()):
        raise UserError("places must all have two coordinates, or all three")
    if not np.isfinite(np.array(list(places.values()), float)).all() or len(set(places.values())) < len(places):
        raise UserError("places must be finite, and no two cells at one place")
    leads: dict[tuple[Hashable, str], Hashable] = {}
    exits: Counter[Hashable] = Counter()
    for origin, target, action in edges:
        if origin == target:
            continue  # to stay is an action of every cell
        if action is None and places:
            steps = (round(b - a, DECIMALS) for a, b in zip(places[origin], places[target], strict=True))
            action = "by " + ",".join(f"{step + 0.0:.12g}" for step in steps)
        elif action is None:
            action = f"exit {exits[origin] + 1}"
        if action == STAY:
            raise UserError(f"the action from {origin} to {target} is called {STAY!r}, which every cell has: rename it")
        exits[origin] += (origin, action) not in leads
        if leads.setdefault((origin, action), target) != target:
            raise UserError(f"action {action!r} leads from cell {origin} to two cells: name one of them otherwise")
    number = {cell: index for index, cell in enumerate(cells)}
    names = tuple(dict.fromkeys([*actions, *(action for _, action in leads)]))
    targets = np.full((len(cells), 1 + len(names)), NOWHERE)
    targets[:, 0] = np.arange(len(cells))
    for (origin, action), target in leads.items():
        targets[number[origin], 1 + names.index(action)] = number[target]
    labels = tuple(",".join(map(str, cell)) if isinstance(cell, tuple) else str(cell) for cell in cells)
    return Graph(labels, (STAY, *names), targets, np.array([places[cell] for cell in cells]) if places else None)
