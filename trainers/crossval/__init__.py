"""Cross-validations: folds that go on where they stopped, their records, tables and predictions."""
