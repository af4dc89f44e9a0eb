"""Quality metrics: distances to real images and deviations from the uncached run, each with an interval.

`catalogue` names them; `extractors` turns images into features once; `scoring` puts an interval on each metric and
pairs it with the reference row. Nothing is imported here, because tables read the catalogue without torch.
"""
