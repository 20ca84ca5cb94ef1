from benchmarks.control_plane.profiler import top_functions

FOLDED = [
    'thread (1): "MainThread";main (a.py:1);send (b.py:2) 30',
    'thread (1): "MainThread";main (a.py:1);send (b.py:2);encode (c.py:3) 10',
    'thread (2): "engine";step (d.py:4);step (d.py:4) 5',
]


def test_functions_are_ranked_by_thread_by_themselves_and_with_callees():
    assert top_functions(FOLDED, 100).splitlines() == [
        ' 40.00%  thread (1): "MainThread"',
        "  itself",
        "     30.00%  send (b.py:2)",
        "     10.00%  encode (c.py:3)",
        "  with callees",
        "     40.00%  main (a.py:1)",
        "     40.00%  send (b.py:2)",
        "     10.00%  encode (c.py:3)",
        '  5.00%  thread (2): "engine"',
        "  itself",
        "      5.00%  step (d.py:4)",
        "  with callees",
        "      5.00%  step (d.py:4)",
    ]
