"""The methods that KVMerger is compared with, one file each."""
