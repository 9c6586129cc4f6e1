"""Words and values that every method is made of: evidence, estimates, and the way between them.

precision     which dtype computes
axes, checks  canonical axes, and what a public function refuses
devices       sums over mapped axes
moments       Moments and Stats, and the one formula by which evidence is pooled
running       estimates blended over batches
standardize   the plain composition: the specification
fused         the derivative rule, equal to the specification
normalize     the whole chain, for any choice of axes
"""
