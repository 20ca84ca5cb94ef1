import threading

import pytest

from infra.local.cache import make_once


def test_a_folder_is_made_once(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "content").write_text("x")

    folder = tmp_path / "deep" / "thing"
    assert make_once(folder, make) == make_once(folder, make) == folder
    assert (folder / "content").read_text() == "x"
    assert len(made) == 1


def test_a_failed_making_leaves_nothing_that_looks_whole(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    folder = tmp_path / "thing"
    with pytest.raises(OSError, match="disk full"):
        make_once(folder, fail)
    assert not folder.exists()
    make_once(folder, lambda whole: (whole / "all").write_text("x"))
    assert [file.name for file in folder.iterdir()] == ["all"]


def test_those_who_ask_together_wait_for_one(tmp_path):
    made = []
    begun = threading.Event()
    finish = threading.Event()

    def make(folder):
        made.append(folder)
        begun.set()
        finish.wait(5)

    askers = [threading.Thread(target=make_once, args=(tmp_path / "thing", make)) for _ in range(3)]
    for asker in askers:
        asker.start()
    begun.wait(5)
    finish.set()
    for asker in askers:
        asker.join()
    assert len(made) == 1
