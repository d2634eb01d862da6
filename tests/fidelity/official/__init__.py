"""One module for each family of methods whose authors' code is recorded by tests.fidelity.record."""
