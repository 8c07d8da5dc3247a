-- SOFA by the hour (Vincent et al., doi 10.1007/BF01709751), as mimic-code counts it (commit 8bcbd190ca75, sofa.sql).
-- Reads: episodes, hours (episode_id, hour: the ends of the hours that are wanted), measurements, vasopressors,
-- ventilation, urine. Makes: sofa (episode_id, hour, score, and the points of the six parts).
--
-- An hour holds what was measured after its start and up to its end. A part counts with its worst points of the last
-- 24 hours. A part that was not measured in them is NULL here and counts as 0, as normal.
-- The macros sofa_pf_ratio(x), sofa_platelets(x), ... are made from SOFA_BANDS in feature_pipeline.py.

-- Dose in ug/kg/min. Without a known dose a drug has the least points that it can have.
CREATE OR REPLACE MACRO vasopressor_points(drug, rate) AS CASE
    WHEN drug IN ('norepinephrine', 'epinephrine') THEN CASE WHEN rate > 0.1 THEN 4 WHEN rate <= 0 THEN 0 ELSE 3 END
    WHEN drug = 'dopamine' THEN CASE WHEN rate > 15 THEN 4 WHEN rate > 5 THEN 3 WHEN rate <= 0 THEN 0 ELSE 2 END
    WHEN drug = 'dobutamine' THEN CASE WHEN rate <= 0 THEN 0 ELSE 2 END
END;

-- mL in 24 h
CREATE OR REPLACE MACRO urine_points(volume) AS CASE
    WHEN volume < 200 THEN 4 WHEN volume < 500 THEN 3 WHEN volume IS NOT NULL THEN 0
END;

CREATE OR REPLACE TABLE sofa_points AS
WITH wanted AS (
    SELECT e.*, w.first_hour, w.last_hour
    FROM episodes e
    JOIN (SELECT episode_id, min(hour) AS first_hour, max(hour) AS last_hour FROM hours GROUP BY episode_id) w
      USING (episode_id)
),
measured AS (
    SELECT w.episode_id, w.client, m.time, m.concept, m.value
    FROM measurements m JOIN wanted w
      ON w.client = m.client AND coalesce(m.visit_id = w.visit_id, true) AND coalesce(m.stay_id = w.stay_id, true)
     AND m.time > w.first_hour - INTERVAL 24 HOURS AND m.time <= w.last_hour
),
ventilated AS (
    SELECT DISTINCT m.episode_id, m.time
    FROM measured m JOIN ventilation v ON v.client = m.client AND m.time BETWEEN v.start AND v.stop
    WHERE m.concept = 'pf_ratio'
),
-- The volume of 24 h from the recordings of the last 23 h, each of which stands for the time since the one before it.
-- It counts where they cover 22 to 30 h.
recorded AS (
    SELECT w.episode_id, w.hours_from, u.time, sum(u.volume) AS volume
    FROM urine u JOIN wanted w
      ON w.client = u.client AND coalesce(u.visit_id = w.visit_id, true)
     AND u.time >= w.episode_start AND u.time <= w.last_hour
    GROUP BY ALL
),
covered AS (
    SELECT *, date_diff('minute', coalesce(lag(time) OVER (PARTITION BY episode_id ORDER BY time), hours_from), time)
              / 60.0 AS lasted
    FROM recorded
),
of_day AS (
    SELECT episode_id, time, sum(volume) OVER day AS volume, sum(lasted) OVER day AS lasted
    FROM covered
    WINDOW day AS (PARTITION BY episode_id ORDER BY time
                   RANGE BETWEEN INTERVAL 23 HOURS PRECEDING AND CURRENT ROW)
),
points AS (
    SELECT episode_id, end_of_hour(time) AS hour, 'respiration' AS part,
           CASE WHEN v.time IS NULL THEN least(sofa_pf_ratio(value), sofa_unventilated()) ELSE sofa_pf_ratio(value) END
               AS points
    FROM measured m LEFT JOIN ventilated v USING (episode_id, time)
    WHERE concept = 'pf_ratio'
    UNION ALL
    SELECT episode_id, end_of_hour(time), CASE concept
               WHEN 'platelets' THEN 'coagulation' WHEN 'bilirubin_total' THEN 'liver'
               WHEN 'mean_bp' THEN 'cardiovascular' WHEN 'gcs' THEN 'nervous' WHEN 'creatinine' THEN 'renal' END,
           CASE concept
               WHEN 'platelets' THEN sofa_platelets(value) WHEN 'bilirubin_total' THEN sofa_bilirubin_total(value)
               WHEN 'mean_bp' THEN sofa_mean_bp(value) WHEN 'gcs' THEN sofa_gcs(value)
               WHEN 'creatinine' THEN sofa_creatinine(value) END
    FROM measured
    WHERE concept IN ('platelets', 'bilirubin_total', 'mean_bp', 'gcs', 'creatinine')
    UNION ALL
    -- a drug counts in the hours at whose end it runs
    SELECT w.episode_id, unnest(generate_series(
               greatest(date_trunc('hour', r.start) + INTERVAL 1 HOUR, end_of_hour(w.episode_start),
                        w.first_hour - INTERVAL 23 HOURS),
               least(r.stop, w.last_hour), INTERVAL 1 HOUR)), 'cardiovascular', vasopressor_points(r.drug, r.rate)
    FROM vasopressors r JOIN wanted w
      ON w.client = r.client AND coalesce(r.visit_id = w.visit_id, true) AND r.stop > r.start
     AND r.start < w.last_hour AND r.stop > w.first_hour - INTERVAL 24 HOURS
    UNION ALL
    SELECT episode_id, end_of_hour(time), 'renal',
           urine_points(max(CASE WHEN lasted BETWEEN 22 AND 30 THEN volume / lasted * 24 END))
    FROM of_day
    GROUP BY ALL
)
SELECT episode_id, hour, part, max(points) AS points FROM points WHERE points IS NOT NULL GROUP BY ALL;

CREATE OR REPLACE TABLE sofa AS
WITH by_hour AS (
    SELECT episode_id, hour, bool_or(wanted) AS wanted,
           max(points) FILTER (part = 'respiration') AS respiration,
           max(points) FILTER (part = 'coagulation') AS coagulation,
           max(points) FILTER (part = 'liver') AS liver,
           max(points) FILTER (part = 'cardiovascular') AS cardiovascular,
           max(points) FILTER (part = 'nervous') AS nervous,
           max(points) FILTER (part = 'renal') AS renal
    FROM (SELECT episode_id, hour, part, points, false AS wanted FROM sofa_points
          UNION ALL
          SELECT episode_id, hour, NULL, NULL, true FROM hours)
    GROUP BY episode_id, hour
),
worst AS (
    SELECT episode_id, hour, wanted,
           max(respiration) OVER day AS respiration, max(coagulation) OVER day AS coagulation,
           max(liver) OVER day AS liver, max(cardiovascular) OVER day AS cardiovascular,
           max(nervous) OVER day AS nervous, max(renal) OVER day AS renal
    FROM by_hour
    WINDOW day AS (PARTITION BY episode_id ORDER BY hour
                   RANGE BETWEEN INTERVAL 23 HOURS PRECEDING AND CURRENT ROW)
)
SELECT episode_id, hour,
       coalesce(respiration, 0) + coalesce(coagulation, 0) + coalesce(liver, 0) + coalesce(cardiovascular, 0)
           + coalesce(nervous, 0) + coalesce(renal, 0) AS score,
       respiration, coagulation, liver, cardiovascular, nervous, renal
FROM worst WHERE wanted;
