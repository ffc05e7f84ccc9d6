"""Train a foundation model without labels: DINO, DINOv2-like or MAE, on a ViT of timm."""
