def pytest_configure(config):
    config.addinivalue_line(
        "markers", "peers: needs what is in build/venv; `make test-peers` runs it, `make test` does not")
