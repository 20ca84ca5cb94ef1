import gc

from shared.engine.step_memory import nothing_collected


def test_nothing_is_collected_inside_and_what_was_before_holds_again():
    with nothing_collected():
        with nothing_collected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
