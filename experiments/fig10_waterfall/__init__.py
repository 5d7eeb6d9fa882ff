"""The study of what each change of the model of ELMoE-3D is worth."""
