"""Spaces against networkx's own graphs; files of every kind; what cannot be walked is refused by name."""

import itertools
import json
import tempfile
from pathlib import Path

import hypothesis
import networkx as nx
import numpy as np
import pytest
from hypothesis import strategies as st

from llm.common.errors import UserError
from small.spaces import NOWHERE, Graph, read, space


def same(graph: Graph, reference: nx.Graph) -> bool:
    """Whether the two are one graph, cells in order."""
    expected = nx.to_numpy_array(reference, nodelist=sorted(reference)) > 0
    return np.array_equal(graph.adjacency, expected)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("11x11", nx.grid_2d_graph(11, 11)),
        ("3x5", nx.grid_2d_graph(3, 5)),
        ("line:7", nx.path_graph(7)),
        ("2x3x4", nx.grid_graph((4, 3, 2))),
    ],
)
def test_regular_spaces_are_those_of_networkx(text: str, reference: nx.Graph) -> None:
    assert same(space(text), reference)


def test_a_hexagonal_space_has_six_neighbours_at_distance_one() -> None:
    graph = space("hex:5x6")
    distances = np.linalg.norm(graph.places[:, None] - graph.places[None], axis=-1)
    assert np.array_equal(graph.adjacency, np.isclose(distances, 1))
    assert graph.adjacency.sum(1).max() == 6
    assert not (distances[~np.eye(30, dtype=bool)] < 0.99).any()


def test_actions_of_a_square_add_one_or_a_row() -> None:
    graph = space("4x6")
    assert graph.actions == ("stay", "right", "down", "up", "left")
    middle = 8
    assert (graph.targets[middle] - middle).tolist() == [0, 1, 6, -6, -1]
    assert graph.targets[0].tolist() == [0, 1, 6, NOWHERE, NOWHERE]


def test_a_family_tree_has_the_relations_of_a_binary_tree() -> None:
    """Against networkx's tree, whose root is the parents of the first generation."""
    graph = space("family:3")
    tree = nx.balanced_tree(2, 3)  # node n has the children 2 n + 1 and 2 n + 2; the root is no person
    parent = {n: (n - 1) // 2 for n in range(1, 15)}
    action = {name: number for number, name in enumerate(graph.actions)}

    def relation(person: int, name: str) -> int | None:
        to = graph.targets[person - 1, action[name]]
        return None if to == NOWHERE else int(to) + 1

    for person, mother in parent.items():
        children = sorted(set(tree[person]) - {mother})
        (sibling,) = set(tree[mother]) - {person} - ({parent[mother]} if mother else set())
        assert relation(person, "sibling") == sibling
        assert relation(person, "parent") == (mother or None)
        assert [relation(person, name) for name in ("daughter", "son")] == (children or [None, None])
        assert [relation(person, name) for name in ("niece", "nephew")] == (
            sorted(set(tree[sibling]) - {mother}) or [None, None]
        )
        if mother:
            assert relation(person, "aunt") == relation(mother, "sibling")
            assert relation(person, "grandparent") == (parent[mother] or None)
            back = relation(relation(relation(person, "parent"), "sibling"), "niece")
            assert (back == person) == (person == min(person, sibling))
    with pytest.raises(UserError, match="family tree of 1 has no relations"):
        space("family:1")


def test_a_graph_survives_its_record() -> None:
    graph = space("hex:3x3")
    again = Graph.from_record(json.loads(json.dumps(graph.record())))
    assert again.cells == graph.cells and again.actions == graph.actions
    assert np.array_equal(again.targets, graph.targets) and np.array_equal(again.places, graph.places)


def test_a_maze_is_drawn_in_characters(tmp_path: Path) -> None:
    path = tmp_path / "maze.txt"
    path.write_text("#####\n#...#\n#.#.#\n#...#\n#####\n")
    graph = read(path)
    assert len(graph.cells) == 8 and graph.actions == ("stay", "right", "down", "up", "left")
    assert nx.is_isomorphic(graph.directed.to_undirected(), nx.cycle_graph(8))
    assert graph.cells[0] == "1,1" and graph.places[0].tolist() == [1, 1]


def test_places_name_the_actions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "space.json"
    places = {"a": [0, 0], "b": [1, 0], "c": [1, 2]}
    path.write_text(json.dumps({"edges": [["a", "b"], ["b", "c"]], "places": places}))
    graph = read(path)
    assert graph.cells == ("a", "b", "c")
    assert set(graph.actions) == {"stay", "by 1,0", "by -1,0", "by 0,2", "by 0,-2"}
    assert graph.targets[0, graph.actions.index("by 1,0")] == 1


def test_named_actions_lead_one_way(tmp_path: Path) -> None:
    path = tmp_path / "family.json"
    edges = [["ann", "bob", "child"], ["bob", "ann", "mother"], ["bob", "cat", "sister"], ["cat", "bob", "brother"]]
    path.write_text(json.dumps({"edges": edges}))
    graph = read(path)
    assert graph.actions == ("stay", "child", "mother", "sister", "brother") and graph.places is None
    assert graph.targets.tolist() == [[0, 1, -1, -1, -1], [1, -1, 0, 2, -1], [2, -1, -1, -1, 1]]


@pytest.mark.parametrize("kind", ["graphml", "gml", "adjlist", "edgelist"])
def test_files_of_networkx_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"space.{kind}"
    reference = nx.relabel_nodes(nx.petersen_graph(), str)
    getattr(nx, f"write_{kind}")(reference, path)
    graph = read(path)
    assert nx.is_isomorphic(nx.Graph(graph.directed), reference)
    assert graph.actions == ("stay", "exit 1", "exit 2", "exit 3")
    assert space(str(path)).cells == graph.cells


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.json", json.dumps({"edges": [["a", "b"], ["c", "d"]]}), "cell c cannot be reached from cell a"),
        ("a.json", json.dumps({"edges": [["a", "b", "on"], ["b", "a", "back"], ["c", "a", "in"]]}), "cell c cannot"),
        (
            "a.json",
            json.dumps({"edges": [["a", "b"]], "places": {"a": [0, 0], "b": [0, 1], "c": [9, 9]}}),
            "cell c has no",
        ),
        (
            "a.json",
            json.dumps({"edges": [["a", "b", "on"], ["b", "a", "back"], ["b", "c", "on"]]}),
            "cell c has no exits",
        ),
        ("a.json", json.dumps({"edges": [["a", "b", "on"], ["a", "c", "on"]]}), "'on' leads from cell a to two"),
        ("a.json", json.dumps({"edges": [["a", "b"]], "places": {"a": [0, 0]}}), "cell b has no place"),
        ("a.json", json.dumps({"edges": [["a"]]}), "is not \\[from, to\\]"),
        ("a.json", json.dumps([1]), 'no list of "edges"'),
        ("a.json", "{", "cannot be read as .json"),
        ("a.txt", "##\n# .\n", "has no exits"),
        ("a.txt", "...#...\n", "0,4 cannot be reached"),
        ("a.txt", "###\n", "needs cells"),
        ("a.graphml", "<graph", "cannot be read as .graphml"),
        ("a.csv", "a,b", "of no known kind"),
    ],
)
def test_what_cannot_be_walked_is_refused(tmp_path: Path, name: str, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        read(written(tmp_path, name, text))


@pytest.mark.parametrize("text", ["11", "11x", "hex:4", "line:3x3", "0x4", "nowhere.json", "2x2x2x2", "1x1"])
def test_unknown_spaces_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        space(text)


# ---- Files that networkx writes --------------------------------------------------------------------------------------

NAMES = st.text(st.sampled_from("abz019 _-.,;:&<>\"'()é漢字\u3000\u00a0🙂\u2028"), min_size=1, max_size=6)


@st.composite
def spaces_to_write(draw: st.DrawFn) -> nx.Graph:
    """A connected graph, with loops; or a directed one whose edges all have an action, a different one at each cell."""
    kind = draw(st.sampled_from([nx.Graph, nx.DiGraph, nx.MultiDiGraph]))
    names = draw(st.lists(NAMES.filter(lambda name: name == name.strip()), min_size=2, max_size=6, unique=True))
    graph = kind()
    graph.add_nodes_from(names)
    pairs = draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=6))
    if kind is nx.Graph:
        graph.add_edges_from([*itertools.pairwise(names), *pairs])
        return graph
    for origin, target in [*zip(names, [*names[1:], names[0]], strict=True), *pairs]:
        taken = {facts["action"] for _, _, facts in graph.out_edges(origin, data=True)}
        free = [action for action in ("north", "go back", "é", "5", "a&b", "six", "seven", "8") if action not in taken]
        if free and not (kind is nx.DiGraph and graph.has_edge(origin, target)):
            graph.add_edge(origin, target, action=free[draw(st.integers(0, len(free) - 1))])
    return graph


@hypothesis.settings(max_examples=150)
@hypothesis.given(spaces_to_write(), st.sampled_from(["graphml", "gml", "adjlist", "edgelist", "json"]), st.data())
def test_a_file_is_read_as_the_graph_that_was_written(graph: nx.Graph, kind: str, data: st.DataObject) -> None:
    directed = graph.is_directed()
    if kind == "adjlist":
        hypothesis.assume(not directed)  # it has no actions
    edges = [[a, b, facts.get("action")] for a, b, facts in graph.edges(data=True)]
    lines = {
        "graphml": lambda: nx.generate_graphml(graph),
        "gml": lambda: nx.generate_gml(graph),
        "adjlist": lambda: nx.generate_adjlist(graph, delimiter="\t"),
        "edgelist": lambda: nx.generate_edgelist(graph, delimiter="\t", data=True),
        "json": lambda: [json.dumps({"edges": edges})],
    }[kind]()
    mark = data.draw(st.sampled_from(["", "\ufeff"]))
    content = mark + data.draw(st.sampled_from(["\n", "\r\n"])).join([*lines, ""])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"space.{kind}"
        path.write_bytes(content.encode())
        if kind == "edgelist" and directed:
            with pytest.raises(UserError, match="has an action and no direction"):
                read(path)
            return
        found = read(path)
    expected = {(a, b, action) for a, b, action in edges if a != b}
    expected |= set() if directed else {(b, a, None) for a, b, _ in expected}
    rows, columns = np.nonzero(found.targets[:, 1:] != NOWHERE)
    ways = {
        (found.cells[row], found.cells[found.targets[row, column + 1]], found.actions[column + 1] if directed else None)
        for row, column in zip(rows, columns, strict=True)
    }
    assert set(found.cells) == set(graph) and ways == expected


def test_an_action_that_is_null_is_none(tmp_path: Path) -> None:
    pairs = [["a", "b"], ["b", "c"], ["c", "a"]]
    plain = read(written(tmp_path, "plain.json", json.dumps({"edges": pairs})))
    null = read(written(tmp_path, "null.json", json.dumps({"edges": [[*pair, None] for pair in pairs]})))
    assert plain.actions == null.actions and plain.targets.tolist() == null.targets.tolist()
    listed = read(written(tmp_path, "null.edgelist", "a b {'action': None}\nb c {}\nc  a\n"))
    assert set(listed.cells) == {"a", "b", "c"} and listed.actions == plain.actions


def test_a_gml_file_without_labels_has_its_ids_as_names(tmp_path: Path) -> None:
    nodes = "".join(f"node [ id {number} ] " for number in (3, 5))
    graph = read(written(tmp_path, "ids.gml", f"graph [ {nodes} edge [ source 3 target 5 ] ]"))
    assert graph.cells == ("3", "5")


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.json", json.dumps({"edges": [["a", None]]}), "None is not the name of cell"),
        ("a.json", json.dumps({"edges": [["a", "b", ["on"]]]}), r"\['on'\] is not the name of an action"),
        ("a.json", json.dumps({"edges": [["a", "b", ""]]}), "'' is not the name of an action"),
        ("a.edgelist", "a b\nb c#d\n", "has # in a name"),
        ("a.gml", 'graph [ node [ id 1 label "a" ] node [ id 2 ] edge [ source 1 target 2 ] ]', "have no label"),
        ("a.txt", "..\t..\n", "neither a cell nor a wall"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(tmp_path: Path, name: str, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        read(written(tmp_path, name, text))
