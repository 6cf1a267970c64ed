"""Atomic writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from w2f_torchrl.utils.files import atomic_path, write_text


@pytest.mark.parametrize("unique", [False, True])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, unique):
    path = tmp_path / "state.json"
    path.write_text("old")

    def fail_half_way() -> None:
        with atomic_path(path, unique=unique) as temporary:
            temporary.write_text("ne")
            assert path.read_text() == "old"
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_text() == "old"
    with atomic_path(path, unique=unique) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path):
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "state.json"
    elsewhere.write_text("not ours")
    Path(tmp_path, ".state.json.tmp").symlink_to(elsewhere)
    write_text(path, "ours")
    assert elsewhere.read_text() == "not ours"
    assert path.read_text() == "ours"
    assert not path.is_symlink()


def test_two_writers_with_names_of_their_own_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "clip.npy"
    with atomic_path(path, unique=True) as first, atomic_path(path, unique=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # its block ended last
    assert list(tmp_path.iterdir()) == [path]
