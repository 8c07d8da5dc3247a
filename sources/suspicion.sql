-- Suspicion of infection: an antibiotic and a culture near one another (Seymour et al., JAMA 2016;315:762,
-- doi 10.1001/jama.2016.0288), with the details of mimic-code (commit 8bcbd190ca75, suspicion_of_infection.sql).
-- Reads: antibiotics, drugs, cultures, episodes. Makes: antibiotic_orders, suspicions (one row for each order).
--
--   culture first     the antibiotic follows within 72 h; the suspicion has the time of the culture
--   antibiotic first  the culture follows within 24 h; the suspicion has the time of the antibiotic
--
-- Both are of one patient, whatever the visit. Culture first has precedence, and of several cultures the earliest one.
-- The first of the two must be strictly earlier: an antibiotic and a culture of the same minute do not match.
-- Where only the date of a culture is known, calendar days are compared: 0 to 3 days after, 0 to 1 day before.

-- What was ordered; in a source without orders, what was given. A patient's orders count for the episode in which they
-- start: a stay in intensive care, or the whole visit.
CREATE OR REPLACE TABLE antibiotic_orders AS
SELECT row_number() OVER (ORDER BY a.client, a.start, a.stop, a.name, a.route, a.visit_id, a.order_id) AS number,
       a.client, a.visit_id, e.episode_id, a.name, a.route, a.start, a.start::DATE AS day
FROM antibiotics a
JOIN drugs d ON d.name = a.name AND d.reference
LEFT JOIN episodes e
       ON e.client = a.client AND coalesce(a.visit_id = e.visit_id, true)
      AND (e.whole_visit AND a.visit_id IS NOT NULL OR a.start >= e.episode_start AND a.start < e.episode_end)
WHERE a.start IS NOT NULL AND NOT is_topical(a.name, a.route)
  AND coalesce(a.administered, false) = (SELECT bool_and(coalesce(administered, false))
                                         FROM antibiotics JOIN drugs USING (name) WHERE reference);

CREATE OR REPLACE TABLE suspicions AS
WITH pairs AS (
    SELECT o.number, c.time, c.specimen, c.positive,
           CASE WHEN c.has_time THEN o.start > c.time AND o.start <= c.time + INTERVAL 72 HOURS
                ELSE o.day BETWEEN c.time::DATE AND c.time::DATE + 3 END AS culture_first,
           CASE WHEN c.has_time THEN o.start < c.time AND o.start >= c.time - INTERVAL 24 HOURS
                ELSE o.day BETWEEN c.time::DATE - 1 AND c.time::DATE END AS antibiotic_first,
           row_number() OVER (
               PARTITION BY o.number, culture_first
               ORDER BY c.time::DATE, CASE WHEN c.has_time THEN c.time END NULLS LAST, c.positive DESC,
                        try_cast(c.culture_id AS BIGINT), c.culture_id
           ) AS place
    FROM antibiotic_orders o JOIN cultures c USING (client)
    WHERE culture_first OR antibiotic_first
),
chosen AS (
    SELECT * FROM pairs WHERE place = 1
    QUALIFY row_number() OVER (PARTITION BY number ORDER BY culture_first DESC) = 1
)
SELECT o.number, o.client, o.visit_id, o.episode_id, o.name AS antibiotic, o.start AS antibiotic_time,
       c.time AS culture_time, CASE WHEN c.culture_first THEN c.time WHEN c.time IS NOT NULL THEN o.start END AS suspicion_time,
       c.specimen, c.positive
FROM antibiotic_orders o LEFT JOIN chosen c USING (number);
