"""The engine that every cache method runs on, and KVMerger itself."""
