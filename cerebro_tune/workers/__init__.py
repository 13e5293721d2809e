"""The Workers contract and its backends: `inline` (the caller's process) and `local` (a process per worker)."""
