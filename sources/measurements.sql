-- Values of the concepts that labels need, in the concept's unit, from `rows` and `meanings` (code and unit to concept,
-- with the line that converts it). A source that knows better, as mimic_iv_labels.sql does, makes the table itself.

CREATE OR REPLACE TABLE measurements AS
WITH kept AS (
    SELECT r.client, r.visit_id, r.charted AS time, m.concept, m.low, m.high, m.other_low, m.other_high,
           coalesce(r.number, number_in(r.value)) * m.factor + m.add_to AS value
    FROM rows r JOIN meanings m ON m.code = r.code AND m.unit = coalesce(trim(r.unit), '')
    WHERE m.concept IN ('platelets', 'bilirubin_total', 'creatinine', 'mean_bp', 'gcs', 'pao2', 'fio2', 'lactate')
)
SELECT client, visit_id, NULL::VARCHAR AS stay_id, time, concept,
       -- oxygen in percent, the one of these concepts that has another usual unit without saying so
       CASE WHEN concept = 'fio2' AND NOT value BETWEEN low AND high THEN value / 100 ELSE value END AS value
FROM kept
WHERE time IS NOT NULL
  AND (value BETWEEN low AND high OR concept = 'fio2' AND value BETWEEN other_low AND other_high);

-- PaO2 over the patient's last FiO2 of the 4 h before it
INSERT INTO measurements
SELECT p.client, p.visit_id, NULL, p.time, 'pf_ratio', p.value / f.value
FROM (FROM measurements WHERE concept = 'pao2') p
ASOF JOIN (SELECT client, time, max(value) AS value FROM measurements WHERE concept = 'fio2' GROUP BY ALL) f
       ON f.client = p.client AND p.time >= f.time
WHERE f.time >= p.time - INTERVAL 4 HOURS;
