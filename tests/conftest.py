def pytest_configure(config):
    config.addinivalue_line(
        "markers", "peers: needs torch and transformers; `make test-peers` runs it, `make test` does not")
