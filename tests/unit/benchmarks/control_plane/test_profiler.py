from benchmarks.control_plane.profiler import top_functions

FOLDED = [
    'thread (1): "MainThread";main (a.py:1);send (b.py:2) 30',
    'thread (1): "MainThread";main (a.py:1);send (b.py:2);encode (c.py:3) 10',
    'thread (2): "engine";step (d.py:4);step (d.py:4) 5',
]


def test_functions_are_ranked_by_thread_by_themselves_and_with_callees():
    assert top_functions(FOLDED).splitlines() == [
        'thread (1): "MainThread": 40 samples',
        "  itself",
        "     75.00%  send (b.py:2)",
        "     25.00%  encode (c.py:3)",
        "  with callees",
        "    100.00%  main (a.py:1)",
        "    100.00%  send (b.py:2)",
        "     25.00%  encode (c.py:3)",
        'thread (2): "engine": 5 samples',
        "  itself",
        "    100.00%  step (d.py:4)",
        "  with callees",
        "    100.00%  step (d.py:4)",
    ]
