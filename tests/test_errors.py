"""What ranks print before they end."""

import pytest

from gaudi_lm import errors


def test_ranks_of_a_host_print_once_what_they_all_have_to_say(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(errors.SAID_VARIABLE, str(tmp_path))
    for rank, text in enumerate(("error: a", "error: b", "error: a")):
        monkeypatch.setenv("RANK", str(rank))
        errors.print_once(text)
    assert capsys.readouterr().err == "error: a\nerror: b\n"


def test_what_a_rank_starts_twice_prints_twice(tmp_path, monkeypatch, capsys):
    """As a script that runs training after training, each in a process that inherits the variable."""
    monkeypatch.setenv(errors.SAID_VARIABLE, str(tmp_path))
    for rank in (0, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        errors.print_once("error: a")
    assert capsys.readouterr().err == "error: a\nerror: a\n"


def test_a_rank_that_was_killed_before_it_printed_is_stood_in_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(errors.SAID_VARIABLE, str(tmp_path))
    monkeypatch.setattr(errors, "print_line", lambda text: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        errors.print_once("error: a")
    monkeypatch.undo()
    monkeypatch.setenv(errors.SAID_VARIABLE, str(tmp_path))
    errors.print_once("error: a")
    assert capsys.readouterr().err == "error: a\n"


@pytest.mark.parametrize("folder", ["", "gone"])
def test_without_a_folder_each_rank_prints(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(errors.SAID_VARIABLE, folder and str(tmp_path / folder))
    errors.print_once("error: a")
    errors.print_once("error: a")
    assert capsys.readouterr().err == "error: a\nerror: a\n"
