"""The format latentds/1 on disks and networks: written, read, checked, fetched."""
