"""containerd's own client suite (integration/client) against pymicro, and against runc in the same run.

`source` fetches and builds it, `images` makes what it pulls, `run` runs one test, `outcome` reads what it printed,
`verdict` compares both runtimes and the list of expected skips (`expected.toml`, read by `expected`).
"""
