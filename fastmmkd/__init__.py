"""fastmmkd: fast training of multimodal sentiment models that survive missing modalities."""
