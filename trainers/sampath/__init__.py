"""Label every pixel: SAM-Path (frozen SAM and pathology encoder), or a plain U-Net beside it."""
