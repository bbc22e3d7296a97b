"""Operations that layers are made of, where Transformer Engine or a GPU kernel is not at hand."""
