"""What a run says before DeepSpeed's engine is there; its log and its steps are in tests/simulator."""

from gaudi_lm.training.deepspeed_engine import say_what_is_locked


def test_what_a_killed_run_was_compiling_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    say_what_is_locked()
    assert not caplog.records
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    say_what_is_locked()
    assert f"{tmp_path / 'cpu_adam' / 'lock'}: cpu_adam is being compiled" in caplog.text
