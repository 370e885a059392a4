"""`peft-arrow cluster`, and the pictures."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest

from peft_arrow import AdapterLibrary, MBCClusterer
from peft_arrow.cli import main
from peft_arrow.clustering.pictures import map_figure
from tests.clustering.planted import planted


@pytest.fixture
def saved(tmp_path):
    """A library of 3 families of 4 in a folder."""
    planted(0, 3, 4)[0].save_pretrained(tmp_path / "library")
    return str(tmp_path / "library")


def test_cluster_merge_and_draw(saved, tmp_path, capsys):
    arguments = ["cluster", saved, "--merge", "--output", str(tmp_path / "small"), "--plots", str(tmp_path / "plots")]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_clusters"] == 3 and found["clusters"]["cluster_1"] == [f"f1v{i}" for i in range(4)]
    assert set(found["lost_norm"]) == set(found["clusters"])
    assert list(AdapterLibrary.from_pretrained(tmp_path / "small")) == ["cluster_0", "cluster_1", "cluster_2"]
    assert all((tmp_path / "plots" / f"{name}.png").is_file() for name in ("similarity", "map", "dendrogram"))
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "12 adapters in 3 clusters, silhouette" in text and "merging lost" in text and "map.png is drawn" in text


def test_bad_arguments(saved, capsys):
    assert main(["cluster", saved, "--merge"]) == 2
    assert "--merge and --output go together" in capsys.readouterr().err
    assert main(["cluster", saved, "--clusters", "13"]) == 2
    assert "n_clusters=13 is more than there are" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["cluster", saved, "--clusters", "few"])


@pytest.mark.parametrize("count", [1, 2, 60])
def test_pictures_of_few_and_many(tmp_path, count):
    library, _ = planted(0, 6, 10)
    found = MBCClusterer(min(count, 6)).fit(library.select(list(library)[:count]))
    files = found.plot(tmp_path)
    assert all(path.stat().st_size > 5000 for path in files.values())
    assert ("dendrogram" in files) == (count > 1)


def test_pictures_name_the_extra(tmp_path, monkeypatch):
    found = MBCClusterer(2).fit(planted(0, 2, 2)[0])
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'peft-arrow\[viz\]'"):
        found.plot(tmp_path)


def test_the_map_puts_together_what_is_alike():
    """Two that are most like each other are the nearest pair; the zero diagonal of an older map parted them."""
    similarity = np.full((6, 6), 0.05)
    for group, cosine in (((0, 1), 0.4), ((2, 3), 0.2), ((4, 5), 0.3)):
        similarity[np.ix_(group, group)] = cosine
    np.fill_diagonal(similarity, 1)
    figure = map_figure(list("abcdef"), np.array([0, 0, 1, 1, 2, 2]), similarity, "a title")
    pairs = [points.get_offsets().data for points in figure.axes[0].collections]
    inside = [np.linalg.norm(pair[0] - pair[1]) for pair in pairs]
    centres = np.stack([pair.mean(axis=0) for pair in pairs])
    between = np.linalg.norm(centres[0] - centres[1:], axis=1)
    assert inside[0] < 0.1 * between.min()
