"""What the message path costs against calling the same engine directly: `python -m benchmarks.control_plane --help`.

__main__ ──> bare      a process with the engine alone: calibrates, then runs every load
         ──> path      the whole stack; for every load `client` processes send the same requests at the same times
         ──> report    the figures side by side
"""
